"""What is told of calls: how many are unfinished, and how long each waited and ran, as a span and metrics.

OpenTelemetry (the package ``opentelemetry-api``) is imported and used only after `enable`. Span and attributes have the
names that are proposed in https://github.com/open-telemetry/semantic-conventions-genai/issues/253; what has none there
begins with ``rag_rerank``.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rag_rerank.errors import ConfigError, short_name

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

# In seconds, from a short document on a GPU to the longest of deadlines; OpenTelemetry's own are for milliseconds.
_BUCKETS = [0.0025 * 2**power for power in range(16)]


@dataclass(frozen=True, slots=True)
class Load:
    """How many calls of a scorer are unfinished in this process.

    Attributes:
        waiting: Those whose work has not begun.
        running: Those that are being worked on; with a server, all that were sent to it.
        most: How many there may be; one more is refused. None for any number.
    """

    waiting: int
    running: int
    most: int | None = None


@dataclass(slots=True, eq=False)
class Call:
    """One call to a back end: when it began, and when its work did, on the clock of `time.monotonic`."""

    began: float = field(default_factory=time.monotonic)
    started: float | None = None

    def start(self) -> None:
        """Note that its work begins; only the first time counts."""
        if self.started is None:
            self.started = time.monotonic()

    def times(self) -> tuple[float, float]:
        """Tell how many seconds it waited, and how many it has run."""
        now = time.monotonic()
        started = now if self.started is None else self.started
        return started - self.began, now - started


current: ContextVar[Call | None] = ContextVar("rag_rerank_call", default=None)
"""The call that a thread or task makes: a back end with a queue notes when its work begins."""


_made: dict[str, Any] | None = None  # what spans and metrics are made with, after `enable`


def enable(tracer_provider: "TracerProvider | None" = None, meter_provider: "MeterProvider | None" = None) -> None:
    """Make a span and metrics of each call to a back end in this process, from now on.

    Args:
        tracer_provider: OpenTelemetry's; None takes the global one.
        meter_provider: The same for metrics.

    Raises:
        ConfigError: The package opentelemetry-api is not installed.
    """
    global _made  # noqa: PLW0603 - one switch for a process, as OpenTelemetry's own providers
    try:
        from opentelemetry import metrics, trace  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ConfigError("telemetry needs OpenTelemetry: pip install opentelemetry-api") from error
    meter = metrics.get_meter("rag_rerank", meter_provider=meter_provider)
    seconds: dict[str, Any] = {"unit": "s", "explicit_bucket_boundaries_advisory": _BUCKETS}
    _made = {
        "tracer": trace.get_tracer("rag_rerank", tracer_provider=tracer_provider),
        "duration": meter.create_histogram("gen_ai.client.operation.duration", **seconds),
        "wait": meter.create_histogram("rag_rerank.wait.duration", **seconds),
        "candidates": meter.create_histogram("rag_rerank.candidates", unit="{document}"),
        "unfinished": meter.create_up_down_counter("rag_rerank.calls.unfinished", unit="{call}"),
    }


def disable() -> None:
    """Make neither spans nor metrics any more."""
    global _made  # noqa: PLW0603 - as in `enable`
    _made = None


@contextlib.contextmanager
def observed(scorer: Any, call: Call, failure: Callable[[], Exception | None], **facts: int | None) -> Iterator[None]:
    """Go around a call of a `Scorer`; make its span, and metrics when it is over, where `failure` gives its error."""
    if _made is None:
        yield
        return
    from opentelemetry.trace import SpanKind, StatusCode  # noqa: PLC0415 - installed, as `enable` has seen

    made, name = _made, type(scorer).__name__
    common = {"gen_ai.operation.name": "rerank", "gen_ai.provider.name": "rag_rerank", "rag_rerank.scorer": name}
    counts = {"gen_ai.rerank.candidate.count": facts["documents"], "rag_rerank.query.count": facts["queries"]}
    if facts["top_n"] is not None:
        counts["gen_ai.rerank.top_n"] = facts["top_n"]
    kind = SpanKind.CLIENT if scorer.remote else SpanKind.INTERNAL
    error: BaseException | None = None
    made["unfinished"].add(1, common)
    with made["tracer"].start_as_current_span(
        "rerank", kind=kind, attributes={**common, **counts}, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield
            error = failure()
        except BaseException as raised:
            error = raised
            raise
        finally:
            wait, run = call.times()
            labels = common | {"gen_ai.request.model": short_name(scorer.model_name)}  # of a server: known by now
            if error is not None:
                labels["error.type"] = type(error).__name__
                span.set_status(StatusCode.ERROR, str(error))
            span.update_name(f"rerank {labels['gen_ai.request.model']}")
            span.set_attributes(labels | {"rag_rerank.wait_time": wait, "rag_rerank.run_time": run})
            made["unfinished"].add(-1, common)
            made["duration"].record(wait + run, labels)
            made["wait"].record(wait, labels)
            made["candidates"].record(facts["documents"], labels)
