"""What its scores tell about a server: their scale, its template, and whether they rank."""

import shlex
from dataclasses import dataclass
from typing import Literal

from rag_rerank.check.access import ROUGHLY_ROUNDED, ROUNDED, TEMPLATES_SINCE, largest_difference, serve
from rag_rerank.check.checked_server import CheckedServer
from rag_rerank.check.finding import Finding, Verdict, failure
from rag_rerank.check.texts import CANDIDATES, KNOWN, QUESTIONS, TWINS, known_pairs, over_long
from rag_rerank.errors import BackendError, BackendRejected, ConfigError, DeadlineExceeded
from rag_rerank.vllm.call import PLAIN_PAIR_TOKENS

Scale = Literal["cosine", "MaxSim", "sigmoid", "bounded", "raw"]

# Right answers on top of a model that ranks: one question may be too hard, or in a language that it never saw.
ENOUGH = QUESTIONS - 1
# Right answers on top that guessing reaches: more come by chance in 5 of 100 cases (binomial, 12 times 1 in 4).
CHANCE = 5
_BARE_PAIR_TOKENS = 4  # "a" and "a" with a causal model's tokenizer: Qwen 2, Llama and Gemma up to 4; BERT 5
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
_MAX_WINDOW = 40_960  # tokens (Qwen3's); to fill a longer one takes minutes


@dataclass(frozen=True, slots=True)
class Sample:
    """Scores of the known pairs."""

    scores: list[float]  # as the scorer's users get them; the right answer first, for each question
    logits: list[float] | None  # with use_activation=False; None where the server does not know that
    twins: list[float]  # of texts against themselves

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
        whole = all(twin > 1.5 and abs(twin - round(twin)) < 0.05 for twin in self.twins)
        if whole and sorted(set(self.twins)) == self.twins:
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
        said = f"right answers got {min(right):.3g} to {max(right):.3g}"
        return f"{said}, wrong ones {min(wrong):.3g} to {max(wrong):.3g}"


def sample(server: CheckedServer) -> Sample:
    """Score what a sample needs."""
    queries, documents = known_pairs()
    scores = server.score(queries, documents)
    twins = server.score(TWINS, TWINS)
    try:
        return Sample(scores, server.score(queries, documents, use_activation=False), twins)
    except (ConfigError, BackendRejected):
        return Sample(scores, None, twins)


_EMBEDDED = {"bi-encoder", "late-interaction", "listwise"}  # methods that compare vectors


def scale(server: CheckedServer, sample: Sample) -> Finding:
    """Say what kind of scores it gives, and what that means for a threshold."""
    kind, family = sample.scale, server.family
    if kind == "cosine" and all(abs(abs(score) - 1) < 1e-3 for score in sample.scores):
        said = "All scores are 1 or -1, cosines of single numbers: a cross-encoder is served as an embedding model."
        checkpoint = shlex.quote(server.facts.checkpoint or server.facts.model)
        return Finding("Scores", "problem", said, f"Serve what this makes: rag-rerank convert {checkpoint} OUT")
    if kind == "cosine" and family is not None and family.method not in _EMBEDDED:
        said = f"The scores are cosines of embeddings, but {family.name} is a reranker: its head is not in use."
        return Finding("Scores", "problem", said, serve(server))
    if kind == "bounded" and server.client.options.use_activation is False:
        said = f"use_activation=False is dropped: no logits, but scores from 0 to 1 come back: {sample.ranges}."
        return Finding("Scores", "problem", said, "Ask the server behind the gateway, or leave out use_activation.")
    said, verdict, remedy = _SCALES[kind]
    return Finding("Scores", verdict, f"{said}: {sample.ranges}.", remedy)


def options(server: CheckedServer, sample: Sample) -> Finding:
    """See which options a server drops that is not known as vLLM: it gives scores, but not those asked for."""
    queries, documents = (texts[:CANDIDATES] for texts in known_pairs())
    dropped = ["use_activation"] if sample.scale == "bounded" and sample.logits is not None else []
    try:
        instructed = server.score(queries, documents, instruction="Find texts in which nobody asks for anything.")
    except (ConfigError, BackendRejected):
        instructed = []
    if instructed and largest_difference(sample.scores[:CANDIDATES], instructed) < ROUNDED:
        dropped.append("instruction")
    if server.ask().prompt_tokens is None:
        dropped.append("usage")
    name = server.program or "It"
    if not dropped:
        return Finding("Options", "good", f"{name} minds use_activation and instruction, and counts tokens.")
    said = f"{name} drops {', '.join(dropped)}, or the model has no place for it."
    verdict: Verdict = "problem" if server.client.options.instruction and "instruction" in dropped else "note"
    return Finding("Options", verdict, said, "Where you need one of them, ask the server behind the gateway.")


def template(server: CheckedServer, sample: Sample) -> Finding | None:
    """See whether pairs are prompted as the model was trained: in the tokens of a pair of one letter each."""
    tokens, family = server.ask().prompt_tokens, server.family
    here, there = server.client.template is not None, tokens is not None and tokens > PLAIN_PAIR_TOKENS
    verdict: Verdict = "good"
    remedy = None
    if tokens is None:
        verdict, said = "note", "It does not count tokens, so nobody can tell whether it uses a score template."
    elif here and there:
        verdict, said = "problem", "Each pair is put into two score templates, one here and one on the server."
        remedy = "Leave out template=, or start the server without --chat-template."
    elif here:
        said = "It is rendered here (template=), and the server has none."
    elif sample.scale in {"cosine", "MaxSim"}:
        said = "None, and embeddings need none."
        if family is not None and family.template is not None:
            return None  # `scale` has said more
    elif there and (family is None or family.template):
        which = "" if family is None else f", as {family.name} needs it"
        said = f"It uses a score template{which} ({tokens} tokens for two of one letter)."
    elif there:
        verdict = "note"
        said = f"It uses a score template, and {family.name if family else ''} was trained without one."
        remedy = "Start it without --chat-template, unless you trained it further so."
    elif family is not None and family.template:
        older = (server.facts.version or TEMPLATES_SINCE) < TEMPLATES_SINCE
        upgrade = f"Upgrade vLLM to {'.'.join(map(str, TEMPLATES_SINCE))} or newer. " if older else ""
        verdict, said = "problem", f"{family.name} ranks at random without its score template."
        remedy = upgrade + serve(server)
    elif family is None and tokens <= _BARE_PAIR_TOKENS:
        verdict = "note" if sample.won >= ENOUGH else "warning"
        said = "It uses no score template, and looks as if it needed one: no special token parts query and document."
        remedy = "Start it with its card's prompt: --chat-template FILE; `rag-rerank template list` shows examples."
    else:
        said = "None, and it looks as if it needed none."
    return Finding("Template", verdict, said, remedy)


def ranking(sample: Sample, *, explained: bool) -> Finding:
    """See whether right answers outscore wrong ones; `explained`: whether an earlier finding says why not."""
    said = f"{sample.won} of {QUESTIONS} known answers outscored three wrong ones"
    if sample.won >= ENOUGH:
        return Finding("Ranking", "good", said + ".")
    if sample.won > CHANCE:
        remedy = "Compare models on your own documents and languages; rag-rerank demo shows how much it gains."
        missed = " and ".join(f'"{question}"' for question in sample.missed[:2])
        more = f" and {len(sample.missed) - 2} more" if len(sample.missed) > 2 else ""
        return Finding("Ranking", "warning", f"{said}, but not those to {missed}{more}.", remedy)
    if sample.lost > CHANCE:
        remedy = "Are its answers swapped? classifier_from_token names the false one first."
        return Finding("Ranking", "problem", f"{said}, and {sample.lost} scored lowest of all.", remedy)
    remedy = (
        "Mend what is said above, then check again."
        if explained
        else "Try rag-rerank rerank with --model CHECKPOINT, without a server: if that ranks rightly, the server's "
        "flags or template are wrong; if not, the model is no reranker, or was never trained."
    )
    return Finding("Ranking", "problem", f"{said}, no better than chance.", remedy)


def window(server: CheckedServer) -> Finding:
    """Say how many tokens it reads; seen on vLLM 0.32: two more than a RoBERTa has positions for."""
    tokens = server.facts.window
    if tokens is None:
        return Finding("Window", "note", "It does not tell how many tokens it reads.")
    if tokens in _POSITIONS_TOO_MANY:
        said = f"It takes {tokens} tokens, two more than a RoBERTa has positions for, and scores long pairs wrongly."
        return Finding("Window", "problem", said, f"Start it with --max-model-len {_POSITIONS_TOO_MANY[tokens]}.")
    return Finding("Window", "good", f"It reads {tokens} tokens.")


def long_documents(server: CheckedServer, sample: Sample) -> Finding:
    """See whether a document that is longer than the window gets a score, and one that means something."""
    tokens = server.facts.window
    if tokens is None or tokens > _MAX_WINDOW:
        return Finding("Long documents", "note", "Not tried: the window is too long to be filled, or not known.")
    try:
        long, other = server.score(*over_long(tokens))
    except DeadlineExceeded:
        said = f"A document that fills the window of {tokens} tokens takes longer than {server.client.timeout:g} s."
        return Finding("Long documents", "warning", said, "Cut documents (max_tokens_per_doc=512), or raise timeout=.")
    except BackendError as error:
        return failure("Long documents", error)
    if sample.won <= CHANCE:
        return Finding("Long documents", "good", f"More than {tokens} tokens are cut and scored.")
    if long > other:
        said = f"A right answer before {tokens} tokens of something else outscores a wrong one."
        return Finding("Long documents", "good", said)
    said = f"A right answer before {tokens} tokens of something else gets {long:.3g}, a wrong one {other:.3g}."
    remedy = "Split documents into passages before they are scored."
    if server.told.has_template:
        remedy = "Set max_tokens_per_doc (vLLM 0.20), so that the end of the prompt is not cut."
    return Finding("Long documents", "problem", said, remedy)
