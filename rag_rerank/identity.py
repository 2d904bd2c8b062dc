"""Who a scorer is: what runs that go on and caches compare, so that the scores of two are never mixed."""

import functools
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SCORING_VERSION = "2"
"""Raised with each release of this package that changes a score of any model."""

PROBES = (
    ("Why is the sky blue?", "Air scatters the short waves of sunlight more than the long ones."),
    ("Why is the sky blue?", "Bread needs flour, water, salt and time."),
    ("how to undo the last commit in git", "git reset --soft HEAD~1 goes one commit back and keeps your changes."),
    ("how to undo the last commit in git", "Git was written by Linus Torvalds in 2005."),
)
"""Pairs whose scores tell two servers apart that say the same of themselves."""

_ROUNDING = 1e-2
# of max(1, |score|): a logit of 8 in bfloat16 is 0.03 from the next, and a server's batches differ from call to call


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a scorer is.

    Attributes:
        facts: All that can change a score, beside query and document, as text; nothing secret.
        probes: Scores of `PROBES`, where the facts alone do not tell two scorers apart; empty elsewhere.
        steady: Whether every score comes from this one scorer; False where another may answer from call to call.
        place: Where it runs: the same scores may take another time elsewhere. Not compared.
        name: What users know it by; of a model in a folder the folder's own name. Not compared.
    """

    facts: Mapping[str, str]
    probes: Sequence[float] = ()
    steady: bool = True
    place: str = field(default_factory=platform.node)
    name: str = ""

    def differences(self, other: "Identity") -> list[str]:
        """Say in what another scorer differs: ``"dtype: float32, before bfloat16"``; empty for the same scorer.

        Args:
            other: The one before.
        """
        found = [
            f"{name}: {self.facts.get(name, 'none')}, before {other.facts.get(name, 'none')}"
            for name in sorted(self.facts.keys() | other.facts.keys())
            if self.facts.get(name) != other.facts.get(name)
        ]
        near = functools.partial(math.isclose, rel_tol=_ROUNDING, abs_tol=_ROUNDING)
        if len(self.probes) != len(other.probes) or not all(map(near, self.probes, other.probes)):
            found.append(f"scores of the probe: {_told(self.probes)}, before {_told(other.probes)}")
        return found


def _told(scores: Sequence[float]) -> str:
    return ", ".join(f"{score:.4g}" for score in scores) or "none"
