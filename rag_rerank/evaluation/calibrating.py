"""Fit a calibration on what an evaluation has scored, and say how far it can be trusted.

Candidates without a judgment count as irrelevant. All intervals are 95 % and over queries, for the documents of one
query stand or fall together.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import betabinom
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from rag_rerank.calibration import Calibration, Curve, known_facts, on_scale
from rag_rerank.errors import ConfigError
from rag_rerank.evaluation.measures import CONFIDENCE, SEED
from rag_rerank.evaluation.results import Evaluation, Kept, keep
from rag_rerank.identity import PROBES
from rag_rerank.scorer import Scorer

FOLDS = 5
DRAWS = 500
FEWEST_KEPT = 20  # documents, below which a threshold's precision is an accident
WIDEST = 0.5  # interval of precision or recall among other queries; beyond it the data can't tell
Kind = Literal["precision", "recall"]
TARGETS: Sequence[tuple[Kind, float]] = (("precision", 0.8), ("precision", 0.9), ("recall", 0.95), ("recall", 0.8))
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of like probability: predicted and observed share of relevant ones, and where the latter was expected."""

    pairs: int
    predicted: float
    observed: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Quality:
    """How good probabilities are: nats a pair; 1 for perfect and 0 for the base rate; expected error in ten bins."""

    log_loss: Interval
    brier_skill: Interval
    calibration_error: Interval
    bins: Sequence[Bin]


@dataclass(frozen=True, slots=True)
class Target:
    """The threshold for a wanted precision or recall.

    `threshold` has its interval over bootstrap draws of the queries. `elsewhere` is the precision or recall of these
    candidates, and the interval of what queries left out of a draw got at the draw's threshold. `why_not` says why the
    data can't tell, and is empty where it can.
    """

    kind: Kind
    wanted: float
    threshold: Interval | None
    elsewhere: Interval | None
    why_not: str


@dataclass(frozen=True, slots=True)
class Calibrating:
    """A calibration, and how far it can be trusted.

    `before` is of the scores, through a sigmoid unless they are between 0 and 1; `after` of the probabilities of
    queries that the curve was not fitted on.
    """

    calibration: Calibration
    base_rate: float
    base_log_loss: float
    before: Quality
    after: Quality
    kept: Sequence[Kept]
    targets: Sequence[Target]

    def as_json(self) -> dict[str, Any]:
        """Make JSON values of it."""
        return asdict(self) | {"pooler_options": self.calibration.pooler_options}


class Pairs:
    """Scored pairs: values that a curve goes over, 1 for relevant and 0 for irrelevant, and the number of the query."""

    def __init__(self, values: Any, relevant: Any, queries: Any) -> None:
        self.values: Floats = np.asarray(values, float)
        self.relevant: NDArray[np.int64] = np.asarray(relevant, np.int64)
        self.queries: NDArray[np.int64] = np.unique(queries, return_inverse=True)[1]
        having = len(np.unique(self.queries[self.relevant == 1]))
        if having < FOLDS:
            raise ConfigError(
                f"of {len(np.unique(self.queries))} queries, {having} have a relevant document among the scored "
                f"candidates; at least {FOLDS} are needed, and a hundred are good. Judge more, or raise the depth."
            )
        if self.relevant.all():
            raise ConfigError("every scored document is relevant, irrelevant ones are needed, too: raise the depth")
        if np.ptp(self.values) == 0:
            raise ConfigError("all scores are equal: they tell nothing about relevance")
        count = int(self.queries.max()) + 1
        drawn = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=DRAWS)
        self.draws = np.vstack([np.ones(count), drawn])  # how often each query counts: once, then as it is drawn

    def sums(self, each: Any, bins: Any = 0, number: int = 1) -> Floats:
        """Add up a value of each pair, in each draw and bin: ``[draws, bins]``."""
        count, weights = self.draws.shape[1] * number, np.broadcast_to(each, self.values.shape)
        table = np.bincount(self.queries * number + bins, weights, count).reshape(-1, number)
        return np.asarray(self.draws @ table)


def calibrate(found: Evaluation, scorer: Scorer) -> Calibrating:
    """Fit a calibration on what `evaluate` has found for a scorer, at its deepest depth.

    Raises:
        ConfigError: No relevant or no irrelevant candidates, too few queries, scores that are equal or no higher for
            what is relevant, or a scorer of several.
        BackendError: As `Scorer.score`.
    """
    identity, rows = scorer.identity(), found.systems[0].scores
    if not identity.steady:
        raise ConfigError("several scorers answer here: calibrate each of them, then join them in a FallbackScorer")
    triples = [
        (score, found.collection.judgments[query].get(name), query)
        for query, row in rows.items()
        for name, score in zip(found.candidates[query], row, strict=False)
        if score is not None
    ]
    if not triples:
        raise ConfigError("no candidate has a score")
    scores, grades, queries = zip(*triples, strict=True)
    scale: Literal["score", "logit"] = "logit" if min(scores) >= 0 and max(scores) <= 1 else "score"
    values = [on_scale(score, scale) for score in scores]
    pairs = Pairs(values, [(grade or 0) > 0 for grade in grades], queries)
    curve, left_out = fit(pairs)
    asked, answers = zip(*PROBES, strict=True)
    known = [on_scale(score, scale) for score in scorer.score(asked, answers)]
    data = {
        "collection": found.collection.name,
        "candidates": f"first {found.depths[-1]} by {found.first_stage}",
        "queries": len(rows),
        "pairs": len(scores),
        "relevant": int(pairs.relevant.sum()),
        "unjudged": grades.count(None),
    }
    references = list(zip(asked, answers, known, strict=True))
    predicted, base = over(curve, pairs.values), float(pairs.relevant.mean())
    each = iter(predicted.tolist())
    probabilities = {query: [None if score is None else next(each) for score in row] for query, row in rows.items()}
    return Calibrating(
        Calibration(known_facts(scorer, identity), references, scale, curve, data),
        base,
        float(log_losses(np.full(len(scores), base), pairs.relevant).mean()),
        quality(pairs, over(Curve("platt", [(0.0, 0.0), (1.0, 1.0)]), pairs.values)),
        quality(pairs, left_out),
        [keep(f"score_threshold={at}", found.collection, found.candidates, probabilities) for at in THRESHOLDS],
        [target(pairs, predicted, kind, wanted) for kind, wanted in TARGETS],
    )


def fit(pairs: Pairs) -> tuple[Curve, Floats]:
    """Fit Platt's curve and an isotonic one, and choose by the log loss of queries that had no part in the fit.

    Returns:
        The curve over all pairs, and the probability of each pair by a curve that its query had no part in.
    """
    folds = list(GroupKFold(FOLDS).split(pairs.values, pairs.relevant, pairs.queries))
    tried = []
    try:
        for method in (_platt, _isotonic):
            left_out = np.empty(len(pairs.values))
            for train, test in folds:
                left_out[test] = over(method(pairs.values[train], pairs.relevant[train]), pairs.values[test])
            loss = log_losses(left_out, pairs.relevant).mean()
            tried.append((loss, method(pairs.values, pairs.relevant), left_out))
    except ValueError as error:  # a curve that does not rise
        raise ConfigError("relevant documents don't have higher scores than others, so no curve fits") from error
    _, curve, left_out = min(tried, key=lambda each: float(each[0]))
    return curve, left_out


def _platt(values: Floats, relevant: NDArray[np.int64]) -> Curve:
    """Fit a logistic regression with Platt's targets, a little off 0 and 1 so that the slope stays finite."""
    right, count, middle, spread = int(relevant.sum()), len(values), float(values.mean()), float(values.std()) or 1.0
    share = np.where(relevant == 1, (right + 1) / (right + 2), 1 / (count - right + 2))
    scaled, labels = np.tile((values - middle) / spread, 2)[:, None], np.repeat([1, 0], count)
    model = LogisticRegression(C=1e9, max_iter=1000).fit(scaled, labels, np.concatenate([share, 1 - share]))
    slope = float(model.coef_[0, 0]) / spread
    if slope <= 0:
        raise ValueError("it falls")
    start = float(model.intercept_[0]) - slope * middle
    return Curve("platt", [(0.0, start), (1.0, start + slope)])


def _isotonic(values: Floats, relevant: NDArray[np.int64]) -> Curve:
    """Fit steps that never fall, kept off 0 and 1 by what one more pair could change."""
    model = IsotonicRegression(y_min=1 / (len(values) + 2), y_max=1 - 1 / (relevant.sum() + 2)).fit(values, relevant)
    shares = model.y_thresholds_
    odds = np.log(shares / (1 - shares)).tolist()
    return Curve("isotonic", list(zip(model.X_thresholds_.tolist(), odds, strict=True)))


def over(curve: Curve, values: Floats) -> Floats:
    """Give the probability at each value."""
    return np.array(list(map(curve.probability, values.tolist())))


def log_losses(predicted: Floats, relevant: Any) -> Floats:
    """Give each pair's loss in nats."""
    return np.asarray(-np.log(np.clip(np.where(relevant == 1, predicted, 1 - predicted), 1e-15, 1)))


def quality(pairs: Pairs, predicted: Floats) -> Quality:
    """Measure probabilities against judgments.

    A bin's interval is that of as many pairs by luck alone, by a curve that was fitted on as many: beta-binomial.
    """
    places = np.minimum((predicted * 10).astype(int), 9)
    bins = []
    for inside in (places == place for place in np.unique(places)):
        size, mean = int(inside.sum()), float(np.clip(predicted[inside].mean(), 1e-9, 1 - 1e-9))
        low, high = betabinom.interval(CONFIDENCE, size, mean * size, (1 - mean) * size)
        bins.append(Bin(size, mean, float(pairs.relevant[inside].mean()), float(low) / size, float(high) / size))
    count = pairs.sums(1)
    base = pairs.sums(pairs.relevant) / count
    losses = pairs.sums(log_losses(predicted, pairs.relevant)) / count
    skills = 1 - pairs.sums((predicted - pairs.relevant) ** 2) / count / np.maximum(base * (1 - base), 1e-9)
    gaps = np.abs(pairs.sums(predicted - pairs.relevant, places, 10)).sum(axis=1) / count[:, 0]
    return Quality(_interval(losses[:, 0]), _interval(skills[:, 0]), _interval(gaps), bins)


def target(pairs: Pairs, predicted: Floats, kind: Kind, wanted: float) -> Target:
    """Find the lowest threshold with a precision, or the highest with a recall, and what it does to other queries."""
    order = np.argsort(-predicted, kind="stable")
    probabilities, relevant, queries = predicted[order], pairs.relevant[order], pairs.queries[order]
    ends = np.append(np.flatnonzero(np.diff(probabilities)), len(order) - 1)  # no cut between equal ones

    def shares(weights: Any) -> tuple[Floats, Floats]:
        kept, right = np.cumsum(weights)[ends], np.cumsum(weights * relevant)[ends]
        return kept, right / np.maximum(kept if kind == "precision" else right[-1], 1)

    thresholds, elsewhere = [], []
    for number, each in enumerate(pairs.draws):
        drawn = each[queries]
        kept, reached = shares(drawn)
        enough = np.flatnonzero(reached >= wanted)
        chosen = int(enough[-1 if kind == "precision" else 0]) if len(enough) else None
        if number == 0:  # all queries
            if chosen is None or kept[chosen] < FEWEST_KEPT:
                best = reached[kept >= FEWEST_KEPT].max(initial=0)
                why = f"no threshold that keeps {FEWEST_KEPT} documents has more than {best:.2f}"
                return Target(kind, wanted, None, None, why)
            others = kept, reached
        else:
            others = shares(drawn == 0)
        if chosen is not None:
            thresholds.append(float(probabilities[ends[chosen]]))
            elsewhere += [float(others[1][chosen])] if others[0][chosen] else []
    threshold, others_get = _interval(np.array(thresholds)), _interval(np.array(elsewhere))
    why = f"among other queries it may be from {others_get.low:.2f} to {others_get.high:.2f}"
    if len(elsewhere) < 0.9 * DRAWS:
        why = "a few queries more or less decide whether any threshold has it"
    elif others_get.high - others_get.low <= WIDEST:
        why = ""
    return Target(kind, wanted, threshold, others_get, why)


def _interval(figures: Floats) -> Interval:
    """Make an interval of a figure and what it was in each draw."""
    low, high = np.quantile(figures[1:] if len(figures) > 1 else figures, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(figures[0]), float(low), float(high))
