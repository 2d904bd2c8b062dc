"""What a server is asked to score: questions with their answers, long documents and many documents.

The questions are of general knowledge, in three languages, and were written for this. A right answer shares few words
with its question, so that a model must understand both.
"""

import random

_LINES = """\
Why is the sky blue?
Air scatters the short waves of sunlight, which look blue, more than the long red ones.
How do bees make honey?
Worker bees gather nectar from flowers and let its water evaporate in the wax of the hive.
What causes the tides of the ocean?
The gravity of the moon, and less that of the sun, lifts and lowers the sea twice a day.
Who wrote Romeo and Juliet?
The tragedy of the two young lovers of Verona is a play by William Shakespeare.
How do I get a red wine stain out of a tablecloth?
Blot the spill at once, cover it with salt and wash the cloth in cold water.
At what temperature does water boil on a high mountain?
Pressure falls with altitude: at 3,000 metres the boiling point is about 90 degrees Celsius.
How do vaccines protect against disease?
They train the immune system to know a germ, so that antibodies are ready for an infection.
How do I undo the last commit in git?
Run git reset --soft HEAD~1: the branch goes one commit back and your changes stay staged.
Warum fallen im Herbst die Blätter von den Bäumen?
Bäume werfen ihr Laub ab, weil sie über die Blätter im Winter zu viel Wasser verlieren würden.
Wie lange kocht man ein weiches Ei?
Vier bis fünf Minuten in kochendem Wasser genügen, dann bleibt das Gelbe vom Ei weich.
¿Cuál es el río más largo de América del Sur?
El Amazonas nace en los Andes del Perú y es el río más largo del continente.
¿Por qué se oxida el hierro?
El hierro se oxida cuando reacciona con el oxígeno y la humedad del aire.
""".splitlines()

KNOWN = tuple(zip(_LINES[::2], _LINES[1::2], strict=True))  # (question, answer)
QUESTIONS = len(KNOWN)
CANDIDATES = 4  # documents for each question, its answer first
# Texts to be scored against themselves, each longer than the one before.
TWINS = ("rain", "The cat sleeps.", "Where do penguins live in the winter?")


def known_pairs() -> tuple[list[str], list[str]]:
    """Make queries and documents, `CANDIDATES` pairs for each question: its answer, then three answers to others.

    The first of these is in the question's own language: a model that knew nothing but languages would else pass.
    """
    queries, documents = [], []
    for number, (question, _) in enumerate(KNOWN):
        candidates = number, number ^ 1, (number + 4) % QUESTIONS, (number + 8) % QUESTIONS
        queries += [question] * CANDIDATES
        documents += [KNOWN[candidate][1] for candidate in candidates]
    return queries, documents


def over_long(window: int) -> tuple[str, list[str]]:
    """Make a question, and two documents: its answer, then more words than the window has tokens; a wrong answer."""
    (question, answer), other = KNOWN[0], KNOWN[4][1]
    beginning = [answer] * max(3, window // 100)  # about a quarter of the window, for models that take an average
    filler = [other] * (1 + window // len(other.split()))
    return question, [" ".join(beginning + filler), KNOWN[3][1]]


def passages(count: int, seed: int) -> list[str]:
    """Make so many documents of 100 words, all different: servers remember what they have read."""
    words = " ".join(answer for _, answer in KNOWN).split()
    draw = random.Random(seed)  # noqa: S311 - no secret
    return [" ".join(draw.choices(words, k=100)) for _ in range(count)]
