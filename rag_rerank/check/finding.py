"""What an examination finds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rag_rerank.check.texts import KNOWN
from rag_rerank.errors import BackendError

Verdict = Literal["good", "note", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        title: What, in a word or two.
        verdict: ``note``: good to know; ``warning``: it works, but not as well or as safely as it should; ``problem``:
            scores fail, or are not what they should be.
        says: What was found, in one sentence.
        remedy: What to do about it.
    """

    title: str
    verdict: Verdict
    says: str
    remedy: str | None = None


def listwise(score: Callable[[str, list[str]], list[float]]) -> Finding:
    """See how much the order of documents changes the scores of a model that reads those of a query together."""
    question, documents = KNOWN[0][0], [answer for _, answer in KNOWN]
    scores = zip(score(question, documents), reversed(score(question, documents[::-1])), strict=True)
    apart = max(abs(forth - back) for forth, back in scores)
    said = "It scores the documents of a query together (listwise): all of a call, which is never split. "
    said += f"In the opposite order, {len(documents)} documents score up to {apart:.1g} otherwise."
    return Finding(
        "Batches", "note", said, "Compare scores within a call only: each depends on the others, and on their order."
    )


def failure(title: str, error: Exception) -> Finding:
    """Make the finding that something failed with `error`."""
    if isinstance(error, BackendError):
        return Finding(title, "problem", sentence(error.message), error.remedy)
    return Finding(title, "problem", sentence(str(error)))


def sentence(text: str) -> str:
    """Give a text a capital letter and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."
