"""What a server is asked to score: questions with their answers, long documents and many documents.

The questions in ``texts.txt`` are of general knowledge, in three languages, and were written for this. A right answer
shares few words with its question, so that a model must understand both.
"""

import random
from pathlib import Path

_LINES = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()

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
