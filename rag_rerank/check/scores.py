"""What its scores tell about a server: their scale, its template, and whether they rank.

Each function looks at one thing; what it needs to know of the others comes as arguments.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rag_rerank.check.finding import Finding, Verdict, failure
from rag_rerank.check.patient import Patient
from rag_rerank.check.server import ROUGHLY_ROUNDED, TEMPLATES_SINCE, largest_difference, serve
from rag_rerank.check.texts import CANDIDATES, KNOWN, QUESTIONS, TWINS, known_pairs, over_long
from rag_rerank.errors import BackendError, BackendRejected, ConfigError, DeadlineExceeded
from rag_rerank.vllm.policy import MOST_TOKENS_OF_A_PLAIN_PAIR

Scale = Literal["cosine", "MaxSim", "sigmoid", "bounded", "raw"]

ENOUGH = QUESTIONS - 1
"""Right answers on top of a model that ranks: one question may be too hard, or in a language that it never saw."""
CHANCE = 5
"""Right answers on top that guessing reaches: more come by chance in 5 of 100 cases (binomial, 12 times 1 in 4)."""
_MOST_TOKENS_OF_A_BARE_PAIR = 4  # "a" and "a" with a causal model's tokenizer: Qwen 2, Llama and Gemma up to 4; BERT 5
_SCALES: dict[Scale, tuple[str, Verdict, str | None]] = {
    "cosine": ("Cosines of embeddings, -1 to 1, and so is a score_threshold", "good", None),
    "sigmoid": ("A cross-encoder's, 0 to 1 by its activation, and so is a score_threshold", "good", None),
    "bounded": ("0 to 1 (use_activation changes nothing, or is not known), and so is a score_threshold", "note", None),
    "raw": ("Raw logits of any size, and so is a score_threshold (0 is where others have 0.5)", "note", None),
    "MaxSim": (
        "Late interaction's, sums over the query's tokens, so no score_threshold suits all queries",
        "note",
        "Keep the best with top_n instead.",
    ),
}
_POSITIONS_TOO_MANY = {514: 512, 8194: 8192}  # RoBERTa's and XLM-RoBERTa's window as vLLM may see it: as it is
_LONGEST_WINDOW = 40_960  # tokens (Qwen3's); to fill a longer one takes minutes


@dataclass(frozen=True, slots=True)
class Sample:
    """Scores of the known pairs.

    Attributes:
        scores: As the scorer's users get them; the right answer first, for each question.
        logits: With ``use_activation=False``; None where the server does not know that.
        twins: Of texts against themselves.
    """

    scores: list[float]
    logits: list[float] | None
    twins: list[float]

    @property
    def scale(self) -> Scale:
        """What kind of scores these are."""
        unmoved = self.logits is not None and largest_difference(self.scores, self.logits) < ROUGHLY_ROUNDED
        bounded = all(0 <= score <= 1 for score in self.scores)
        # Where logits can't be had, a cross-encoder that is very sure of a text and itself looks the same, but then it
        # is as sure of what is irrelevant.
        mild = self.logits is None and (not bounded or max(self.scores) - min(self.scores) < 0.9)
        if (unmoved or mild) and all(abs(twin - 1) < 0.02 for twin in self.twins):
            return "cosine"
        # Each token of the query finds itself: the score is the number of tokens.
        if sorted(set(self.twins)) == self.twins and all(
            twin > 1.5 and abs(twin - round(twin)) < 0.05 for twin in self.twins
        ):
            return "MaxSim"
        if bounded:
            return "bounded" if unmoved or self.logits is None else "sigmoid"
        return "raw"

    @property
    def questions(self) -> list[list[float]]:
        """The scores of each question's documents, its answer first."""
        return [self.scores[start : start + CANDIDATES] for start in range(0, len(self.scores), CANDIDATES)]

    @property
    def missed(self) -> list[str]:
        """The questions whose answers did not outscore all wrong ones."""
        pairs = zip(KNOWN, self.questions, strict=True)
        return [question for (question, _), scores in pairs if scores[0] <= max(scores[1:])]

    @property
    def won(self) -> int:
        """How many answers outscored the wrong ones."""
        return QUESTIONS - len(self.missed)

    @property
    def lost(self) -> int:
        """How many were outscored by all of them."""
        return sum(scores[0] < min(scores[1:]) for scores in self.questions)

    @property
    def ranges(self) -> str:
        """What relevant documents got, and what others did."""
        right = [scores[0] for scores in self.questions]
        wrong = [score for scores in self.questions for score in scores[1:]]
        return (
            f"right answers got {min(right):.3g} to {max(right):.3g}, wrong ones {min(wrong):.3g} to {max(wrong):.3g}"
        )


def sample(patient: Patient) -> Sample:
    """Score what a sample needs.

    Raises:
        BackendError, ConfigError: As `VLLMScorer.score`.
    """
    queries, documents = known_pairs()
    scores = patient.score(queries, documents)
    twins = patient.score(TWINS, TWINS)
    if patient.server.version is None and patient.api == "rerank":
        return Sample(scores, None, twins)  # another make of server, which ignores what it does not know
    try:
        return Sample(scores, patient.score(queries, documents, logits=True), twins)
    except (ConfigError, BackendRejected):
        return Sample(scores, None, twins)


def scale(patient: Patient, sample: Sample) -> Iterator[Finding]:
    """What kind of scores it gives, and what that means for a threshold."""
    kind, family = sample.scale, patient.family
    if kind == "cosine" and family is not None and family.method not in {"bi-encoder", "late-interaction"}:
        said = f"The scores are cosines of embeddings, but {family.name} is a reranker: its head is not in use."
        yield Finding("Scores", "problem", said, serve(patient))
        return
    said, verdict, remedy = _SCALES[kind]
    yield Finding("Scores", verdict, f"{said}: {sample.ranges}.", remedy)


def template(patient: Patient, sample: Sample) -> Iterator[Finding]:
    """Whether pairs are prompted as the model was trained; it shows in the tokens of a pair of one letter each."""
    tokens, family = patient.ask("a", "a").prompt_tokens, patient.family
    if tokens is None:
        said = "It does not count tokens, so nobody can tell whether it uses a score template."
        yield Finding("Template", "note", said)
        return
    templated = tokens > MOST_TOKENS_OF_A_PLAIN_PAIR
    if patient.renders:
        yield _rendered_here(templated)
    elif sample.scale in {"cosine", "MaxSim"}:
        if family is None or family.template is None:
            yield Finding("Template", "good", "None, and embeddings need none.")  # else `scale` has said more
    elif templated and (family is None or family.template):
        which = "" if family is None else f", as {family.name} needs it"
        yield Finding("Template", "good", f"It uses a score template{which} ({tokens} tokens for two of one letter).")
    elif templated:
        said = f"It uses a score template, and {family.name if family else ''} was trained without one."
        yield Finding("Template", "note", said, "Start it without --chat-template, unless you trained it further so.")
    elif family is not None and family.template:
        yield Finding(
            "Template", "problem", f"{family.name} ranks at random without its score template.", _how(patient)
        )
    elif family is None and tokens <= _MOST_TOKENS_OF_A_BARE_PAIR:
        said = "It uses no score template, and looks as if it needed one: no special token parts query and document."
        remedy = (
            "Start it with the prompt of its card: --chat-template FILE; `rag-rerank template list` shows examples."
        )
        yield Finding("Template", "note" if sample.won >= ENOUGH else "warning", said, remedy)
    else:
        yield Finding("Template", "good", "None, and it looks as if it needed none.")


def _rendered_here(templated: bool) -> Finding:
    if templated:
        said = "Each pair is put into two score templates, one here and one on the server."
        return Finding("Template", "problem", said, "Leave out template=, or start the server without --chat-template.")
    return Finding("Template", "good", "It is rendered here (template=), and the server has none.")


def _how(patient: Patient) -> str:
    """How a patient gets the template that it needs."""
    known = patient.server.version
    if known is not None and known < TEMPLATES_SINCE:
        return f"Upgrade vLLM to {'.'.join(map(str, TEMPLATES_SINCE))} or newer. {serve(patient)}"
    return serve(patient)


def ranking(sample: Sample, *, explained: bool) -> Iterator[Finding]:
    """Whether right answers outscore wrong ones; `explained`: whether an earlier finding says why not."""
    said = f"{sample.won} of {QUESTIONS} known answers outscored three wrong ones"
    if sample.won >= ENOUGH:
        yield Finding("Ranking", "good", said + ".")
    elif sample.won > CHANCE:
        remedy = (
            "Compare with other models on your own documents and languages; rag-rerank demo shows how much it gains."
        )
        missed = " and ".join(f'"{question}"' for question in sample.missed[:2])
        more = f" and {len(sample.missed) - 2} more" if len(sample.missed) > 2 else ""
        yield Finding("Ranking", "warning", f"{said}, but not those to {missed}{more}.", remedy)
    elif sample.lost > CHANCE:
        remedy = "Are its answers swapped? classifier_from_token names the false one first."
        yield Finding("Ranking", "problem", f"{said}, and {sample.lost} scored lowest of all.", remedy)
    else:
        remedy = (
            "Mend what is said above, then check again."
            if explained
            else "Try rag-rerank rerank with --model CHECKPOINT, without a server: if that ranks rightly, the server's "
            "flags or template are wrong; if not, the model is no reranker, or was never trained."
        )
        yield Finding("Ranking", "problem", f"{said}, no better than chance.", remedy)


def window(patient: Patient) -> Iterator[Finding]:
    """How many tokens it reads; seen on vLLM 0.32: two more than a RoBERTa has positions for."""
    tokens = patient.server.window
    if tokens is None:
        yield Finding("Window", "note", "It does not tell how many tokens it reads.")
    elif tokens in _POSITIONS_TOO_MANY:
        right = _POSITIONS_TOO_MANY[tokens]
        said = f"It takes {tokens} tokens, two more than a RoBERTa has positions for, and scores long pairs wrongly."
        yield Finding("Window", "problem", said, f"Start it with --max-model-len {right}.")
    else:
        yield Finding("Window", "good", f"It reads {tokens} tokens.")


def long_documents(patient: Patient, sample: Sample) -> Iterator[Finding]:
    """Whether a document that is longer than the window gets a score, and one that means something."""
    tokens = patient.server.window
    if tokens is None or tokens > _LONGEST_WINDOW:
        yield Finding("Long documents", "note", "Not tried: the window is too long to be filled, or not known.")
        return
    try:
        long, other = patient.score(*over_long(tokens))
    except DeadlineExceeded:
        said = f"A document that fills the window of {tokens} tokens takes longer than {patient.timeout:g} s."
        yield Finding("Long documents", "warning", said, "Cut documents (max_tokens_per_doc=512), or raise timeout=.")
    except BackendError as error:
        yield failure("Long documents", error)
    else:
        if sample.won <= CHANCE:
            yield Finding("Long documents", "good", f"More than {tokens} tokens are cut and scored.")
        elif long > other:
            said = f"A right answer before {tokens} tokens of something else outscores a wrong one."
            yield Finding("Long documents", "good", said)
        else:
            said = f"A right answer before {tokens} tokens of something else gets {long:.3g}, a wrong one {other:.3g}."
            remedy = "Split documents into passages before they are scored."
            if (patient.told or patient.server).templated:
                remedy = "Set max_tokens_per_doc (vLLM 0.20), so that the end of the prompt is not cut."
            yield Finding("Long documents", "problem", said, remedy)
