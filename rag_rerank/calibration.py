"""Calibration: from scores to probabilities of relevance, by a small file that ``rag-rerank calibrate`` writes.

The file fits one model with one template and instruction, wherever that runs: the scores of a few reference pairs are
in it and are compared with the scorer's own before its first scores are converted.
"""

import asyncio
import copy
import json
import logging
import math
import os
import shlex
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, Self

from rag_rerank.errors import BackendError, ConfigError
from rag_rerank.fallback import FallbackScorer
from rag_rerank.identity import PROBES, Identity
from rag_rerank.scorer import Scorer

_FORMAT = "rag-rerank calibration 1"
_TOLERANCE = 1e-3  # between the reference pairs' scores in float32, here and on a server
_HALF_PRECISION = 5e-2  # of max(1, |score|): bfloat16 has 8 bits, and errors of the layers add up
_FLOAT32 = 2e-7  # twice what a score just below 1 is rounded by
_LARGEST = 16.0  # logits beyond it are 0 or 1 in float32

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve from values to probabilities.

    Attributes:
        method: ``"platt"``, a straight line of log-odds through two points; or ``"isotonic"``, straight from point to
            point and level beyond them.
        points: (value, log-odds), ascending.

    Raises:
        ValueError: They do not rise.
    """

    method: Literal["platt", "isotonic"]
    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        if self.method not in ("platt", "isotonic") or len(self.points) < 2:
            raise ValueError(f"method {self.method!r} with {len(self.points)} points")
        if not all(math.isfinite(each) for point in self.points for each in point):
            raise ValueError("a point is not finite")
        if any(one[0] >= other[0] or one[1] > other[1] for one, other in pairwise(self.points)):
            raise ValueError("the points do not rise")

    def probability(self, value: float) -> float:
        """Give the probability at a value."""
        points = self.points
        if self.method == "isotonic":
            value = min(max(value, points[0][0]), points[-1][0])
        position = min(max(bisect_right(points, value, key=itemgetter(0)), 1), len(points) - 1)
        (left, low), (right, high) = points[position - 1 : position + 1]
        odds = low + (high - low) * (value - left) / (right - left)
        return 1 / (1 + math.exp(-odds)) if odds >= 0 else math.exp(max(odds, -700.0)) / (1 + math.exp(odds))


@dataclass(frozen=True, slots=True)
class Calibration:
    """What turns a model's scores into probabilities.

    Attributes:
        facts: What scored, see `known_facts`.
        references: (query, document, its score on the fitted scale): by these the model is known again.
        scale: What was fitted: ``"score"``, or ``"logit"`` of a score between 0 and 1.
        curve: From there to probabilities.
        fitted_on: What the data was, for people.
    """

    facts: Mapping[str, str]
    references: Sequence[tuple[str, str, float]]
    scale: Literal["score", "logit"]
    curve: Curve
    fitted_on: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The model's name."""
        return self.facts["model"]

    @property
    def pooler_options(self) -> str | None:
        """The options by which a vLLM server gives these probabilities itself; None where it can't.

        It can where it serves a cross-encoder, the curve is Platt's, and the model's family needs no such option.
        """
        kind, activation = (self.facts.get(name, "") for name in ("score type", "activation"))
        if self.curve.method != "platt" or kind in ("bi-encoder", "late-interaction") or " of logits" in activation:
            return None
        (_, start), (_, end) = self.curve.points
        pooler = {"logit_mean": start / (start - end), "logit_sigma": 1 / (end - start)}
        sigmoid = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}
        return f"--pooler-config {shlex.quote(json.dumps(pooler))} --hf-overrides {shlex.quote(json.dumps(sigmoid))}"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read the file that `save` or ``rag-rerank calibrate`` has written; a ConfigError where it is no such file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            known = values.pop("format") == _FORMAT and values["scale"] in ("score", "logit")
            if not (known and values["references"] and values["facts"]["model"]):
                raise ValueError(f"not {_FORMAT!r}, or it lacks model, scale or references")  # noqa: TRY301
            values["references"] = [(str(one), str(other), float(score)) for one, other, score in values["references"]]
            method, points = values["curve"]["method"], values["curve"]["points"]
            values["curve"] = Curve(method, [(float(value), float(odds)) for value, odds in points])
            return cls(**values)
        except OSError as error:
            raise ConfigError(f"the calibration {path} can't be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no calibration: {error}. rag-rerank calibrate writes one") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; a ConfigError where it can't be written."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, ensure_ascii=False, allow_nan=False, indent=1)
        try:
            Path(path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} can't be written: {error.strerror or error}") from error

    def scale_of(self, scores: Sequence[float], scorer: Scorer, deadline: float | None = None) -> str:
        """Tell on which scale a scorer's scores of the reference pairs are, its logits or what it makes of them.

        A ConfigError says that they are another model's, and in what it differs.
        """
        # A scorer that gives logits fits a curve over the logits of its other scale, and the other way round.
        scales = [scale for scale in ("score", "logit") if scale == "score" or 0 <= min(scores) <= max(scores) <= 1]
        for scale in scales:
            if self._fits(scores, scale):
                return scale
        differences = self._differences(scorer, deadline)
        for scale in scales:
            if not differences and self._fits(scores, scale, half=True):
                logger.warning("%s was fitted with another dtype: probabilities differ a little", self.model)
                return scale
        now, then = (", ".join(f"{each:.4g}" for each in row) for row in (scores, [row[2] for row in self.references]))
        changes = "; ".join([f"scores of the reference pairs: {now}, before {then}", *differences])
        raise ConfigError(
            f"the calibration was fitted for {self.model}, and {scorer.model_name} is not that or has another template "
            f"or instruction ({changes}). Run rag-rerank calibrate with this scorer."
        )

    def _fits(self, scores: Sequence[float], scale: str, *, half: bool = False) -> bool:
        for score, (_, _, value) in zip(scores, self.references, strict=True):
            most = _HALF_PRECISION * max(1.0, abs(value)) if half else _TOLERANCE
            most += _FLOAT32 / max(score * (1 - score), _FLOAT32) if scale == "logit" else 0.0
            if not abs(on_scale(score, scale) - value) <= most:  # a value that is not a number fits nothing
                return False
        return True

    def _differences(self, scorer: Scorer, deadline: float | None) -> list[str]:
        """Say in what the scorer is known to differ, but for its dtype and what the scores tell."""
        now, then = known_facts(scorer, scorer.identity(deadline=deadline)), self.facts
        same_class = now["scorer"] == then.get("scorer")  # one of another class says other things of itself
        told = (now.keys() | then.keys()) - {"dtype", "activation", "use_activation"} if same_class else {"model"}
        now, then = ({name: fact for name, fact in facts.items() if name in told} for facts in (now, then))
        return Identity(now).differences(Identity(then))


def known_facts(scorer: Scorer, identity: Identity) -> dict[str, str]:
    """Give the identity's facts, with the last part of the model's name, which a folder has as well as the hub."""
    return {**identity.facts, "model": Path(scorer.model_name).name}


def on_scale(score: float, scale: str) -> float:
    """Turn a score between 0 and 1 into its logit, within what float32 can tell, if that is the scale."""
    if scale == "score":
        return score
    if not 0 < score < 1:
        return _LARGEST if score >= 1 else -_LARGEST
    return min(max(math.log(score) - math.log1p(-score), -_LARGEST), _LARGEST)


class Calibrated(Scorer):
    """Gives probabilities of relevance instead of another scorer's scores.

    Args:
        scorer: What scores, here or on a server. Closing this one closes it.
        calibration: The file that ``rag-rerank calibrate`` has written for its model, or a `Calibration`.

    Raises:
        ConfigError: At construction, the file can't be read, or the scorer is a `FallbackScorer`: calibrate each of
            its scorers. With the first call, the file was fitted for another model, template or instruction: the
            scores of its reference pairs differ by more than 1e-3. By no more than half precision explains, and with
            nothing else known to differ: one logged warning.

    Platt's curve leaves the order of the documents as it is. An isotonic one has steps: documents on one step have
    equal scores and stay in retrieval order.
    """

    calibrated = True
    _locates_failures = True  # the scorer has done so

    def __init__(self, scorer: Scorer, calibration: str | os.PathLike[str] | Calibration) -> None:
        if not isinstance(scorer, Scorer):
            raise TypeError(f"scorer must be a Scorer, got {type(scorer).__name__}")
        if isinstance(scorer, FallbackScorer):
            raise ConfigError("each scorer has its own calibration: FallbackScorer(Calibrated(...), Calibrated(...))")
        self._scorer = scorer
        self._calibration = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
        queries, documents, _ = zip(*self._calibration.references, strict=True)
        self._references = queries, documents
        self._scale: str | None = None  # of the scorer's scores; None before they were compared
        self.remote = scorer.remote

    @property
    def model_name(self) -> str:
        """The model of the scorer."""
        return self._scorer.model_name

    @property
    def accepts_images(self) -> bool:  # type: ignore[override]  # as that of the scorer
        """Whether the scorer's model reads images."""
        return self._scorer.accepts_images

    @property
    def listwise(self) -> bool:  # type: ignore[override]
        """Whether the scorer's model scores a query's documents together."""
        return self._scorer.listwise

    def identity(self, *, deadline: float | None = None) -> Identity:
        """Say who the scorer is, and by what its scores are converted."""
        identity = self._scorer.identity(deadline=deadline)
        curve = json.dumps([self._calibration.scale, *asdict(self._calibration.curve).values()])
        probes = self.score(*zip(*PROBES, strict=True), deadline=deadline) if identity.probes else ()
        return replace(identity, facts={**identity.facts, "calibration": curve}, probes=probes)

    # Any: a scorer takes from another what was prepared for it. No instruction: `accepts_instruction` says so.
    def _score(self, queries: Any, documents: Any, until: float | None) -> list[float]:  # type: ignore[override]
        if self._scale is None:
            scores = self._scorer.score(*self._references, deadline=_left(until))
            self._scale = self._calibration.scale_of(scores, self._scorer, _left(until))
        with self._converted():
            return self._probabilities(self._scorer.score(queries, documents, deadline=_left(until)))

    async def _ascore(self, queries: Any, documents: Any, until: float | None) -> list[float]:  # type: ignore[override]
        if self._scale is None:
            scores = await self._scorer.ascore(*self._references, deadline=_left(until))
            self._scale = await asyncio.to_thread(self._calibration.scale_of, scores, self._scorer, _left(until))
        with self._converted():
            return self._probabilities(await self._scorer.ascore(queries, documents, deadline=_left(until)))

    def _probabilities(self, scores: Sequence[float]) -> list[float]:
        scale = self._scale or self._calibration.scale
        return [self._calibration.curve.probability(on_scale(score, scale)) for score in scores]

    @contextmanager
    def _converted(self) -> Iterator[None]:
        """Convert the scores that an error has of the documents that it does not concern."""
        try:
            yield
        except BackendError as error:
            if not error.scores:
                raise
            told = copy.copy(error)
            known = self._probabilities([score for score in error.scores if score is not None])
            told.scores = tuple(None if score is None else known.pop(0) for score in error.scores)
            raise told from error.__cause__

    def _close(self) -> None:
        self._scorer.close()

    async def _aclose(self) -> None:
        await self._scorer.aclose()

    def __repr__(self) -> str:
        return f"Calibrated({self._scorer!r})"


def _left(until: float | None) -> float | None:
    """Seconds until then; None leaves it to the scorer."""
    return None if until is None else until - time.monotonic()
