"""What an examination finds."""

from dataclasses import dataclass
from typing import Literal

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


def failure(title: str, error: Exception) -> Finding:
    """Make the finding that something failed with `error`."""
    if isinstance(error, BackendError):
        return Finding(title, "problem", sentence(error.message), error.remedy)
    return Finding(title, "problem", sentence(str(error)))


def sentence(text: str) -> str:
    """Give a text a capital letter and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."
