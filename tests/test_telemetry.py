"""What is told of calls: the load, a span and metrics, through OpenTelemetry's SDK."""

import asyncio
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rag_rerank import BackendUnavailable, BadReply, FallbackScorer, Load, LocalScorer, Scorer, VLLMScorer, telemetry
from tests.faulty_server import FaultyServer
from tests.scorers import Answers, WordOverlap


class Gate(Scorer):
    """Answers once it is opened."""

    model_name = "/srv/models/gate"
    _max_waiting_calls = 2

    def __init__(self) -> None:
        self.opened, self.entered = threading.Event(), threading.Semaphore(0)

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        self.entered.release()
        assert self.opened.wait(60)
        return [0.0] * len(documents)


class Telemetry:
    """OpenTelemetry's SDK with what it was given in memory."""

    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider(metric_readers=[self.reader])

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    @property
    def points(self) -> dict[str, list]:
        (resource,) = self.reader.get_metrics_data().resource_metrics
        (scope,) = resource.scope_metrics
        return {metric.name: list(metric.data.data_points) for metric in scope.metrics}


@pytest.fixture
def seen() -> Iterator[Telemetry]:
    seen = Telemetry()
    telemetry.enable(seen.tracers, seen.meters)
    yield seen
    telemetry.disable()


class TestLoad:
    """How many calls wait and run."""

    def test_it_counts_unfinished_calls(self):
        """Nothing before the first call, in an unpickled copy, and when all are done."""
        scorer = Gate()
        assert scorer.load == Load(waiting=0, running=0, most=2)
        thread = threading.Thread(target=scorer.score, args=("q", ["d"]))
        thread.start()
        assert scorer.entered.acquire(timeout=60)
        assert scorer.load == Load(waiting=0, running=1, most=2)
        scorer.opened.set()
        thread.join()
        assert scorer.load.running == 0
        assert pickle.loads(pickle.dumps(WordOverlap())).load == Load(0, 0, None)  # noqa: S301

    def test_a_call_that_waits_for_others_is_told_apart(self, monkeypatch: pytest.MonkeyPatch):
        """Locally: its work has not begun, for the model still loads."""
        loading, load = threading.Event(), threading.Event()

        def slow_load(settings: object) -> None:
            loading.set()
            assert load.wait(60)
            raise MemoryError

        monkeypatch.setattr("rag_rerank.local.scorer._load", slow_load)
        with LocalScorer("some/model") as scorer:
            thread = threading.Thread(target=pytest.raises, args=(Exception, scorer.score, "q", ["d"]))
            thread.start()
            assert loading.wait(60)
            assert scorer.load == Load(waiting=1, running=0, most=1024)
            load.set()
            thread.join()
            assert scorer.load.waiting == 0

    async def test_one_call_too_many_is_told_when_to_come_again(self):
        """By about how long calls take; where none has ended yet, by how long the oldest has taken."""
        scorer = Gate()
        calls = [asyncio.create_task(scorer.ascore("q", ["d"])) for _ in range(2)]
        await asyncio.to_thread(scorer.entered.acquire)
        await asyncio.to_thread(scorer.entered.acquire)
        with pytest.raises(BackendUnavailable, match="^gate has 2 calls waiting already") as caught:
            await scorer.ascore("q", ["d"])
        assert caught.value.retry_after >= 0.1
        assert caught.value.model == "/srv/models/gate"
        scorer.opened.set()
        await asyncio.gather(*calls)


class TestSpans:
    """One a call, with what the conventions ask for."""

    async def test_what_it_holds(self, seen: Telemetry):
        """For score and rerank, sync and async: model, candidates, top_n, times."""
        scorer = WordOverlap()
        scorer.score("a", ["a", "b"])
        await scorer.arerank("a", ["a", "b", "c"], top_n=2)
        scored, reranked = (dict(span.attributes) for span in seen.spans)
        assert {span.name for span in seen.spans} == {"rerank word overlap"}
        assert scored.pop("rag_rerank.wait_time") >= 0
        assert scored.pop("rag_rerank.run_time") >= 0
        assert scored == {
            "gen_ai.operation.name": "rerank",
            "gen_ai.provider.name": "rag_rerank",
            "gen_ai.request.model": "word overlap",
            "gen_ai.rerank.candidate.count": 2,
            "rag_rerank.query.count": 1,
            "rag_rerank.scorer": "WordOverlap",
        }
        assert (reranked["gen_ai.rerank.candidate.count"], reranked["gen_ai.rerank.top_n"]) == (3, 2)

    @pytest.mark.parametrize("on_error", ["raise", "passthrough"])
    def test_a_failure_is_its_status(self, seen: Telemetry, on_error: str):
        """Also where the caller is spared it; no document's text is in it."""

        def fail(documents: list[str]) -> list[float]:
            raise BackendUnavailable("nobody there")

        try:
            Answers(fail).rerank("q", ["secret"], on_error=on_error)
        except BackendUnavailable:
            assert on_error == "raise"
        (span,) = seen.spans
        assert span.status.description == "nobody there."
        assert span.attributes["error.type"] == "BackendUnavailable"
        assert "secret" not in span.to_json()

    def test_documents_without_a_score_are_a_failure(self, seen: Telemetry):
        """Though others have one."""
        with pytest.raises(BadReply):
            Answers(lambda documents: [float("nan") if each == "b" else 1.0 for each in documents]).score(
                "q", ["a", "b"]
            )
        assert seen.spans[0].attributes["error.type"] == "BadReply"

    async def test_a_cancelled_call_ends_its_span(self, seen: Telemetry):
        """And is not counted as unfinished any more."""
        scorer = Gate()
        call = asyncio.create_task(scorer.ascore("q", ["d"]))
        await asyncio.to_thread(scorer.entered.acquire)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        scorer.opened.set()
        assert seen.spans[0].attributes["error.type"] == "CancelledError"
        assert [point.value for point in seen.points["rag_rerank.calls.unfinished"]] == [0]

    def test_they_are_nested(self, seen: Telemetry):
        """A fallback's is around those of its scorers, and the caller's around all."""
        with seen.tracers.get_tracer("app").start_as_current_span("request"):
            FallbackScorer(WordOverlap()).score("a", ["a"])
        inner, outer, request = seen.spans
        assert (inner.parent.span_id, outer.parent.span_id) == (outer.context.span_id, request.context.span_id)

    def test_the_model_of_a_server_is_known_at_the_end(self, seen: Telemetry):
        """Not before it was asked; and the span is a client's."""
        with FaultyServer() as server, VLLMScorer(server.base_url) as scorer:
            scorer.score("q", ["d"])
        (span,) = seen.spans
        assert (span.name, span.kind.name, span.attributes["gen_ai.request.model"]) == ("rerank m", "CLIENT", "m")

    def test_metrics_have_the_same_names(self, seen: Telemetry):
        """Histograms of time, waiting and candidates, by model; buckets that suit seconds."""
        WordOverlap().score("a", ["a", "b"])
        points = seen.points
        (duration,) = points["gen_ai.client.operation.duration"]
        assert (duration.count, duration.attributes["gen_ai.request.model"]) == (1, "word overlap")
        assert duration.explicit_bounds[0] < 0.01
        assert points["rag_rerank.candidates"][0].sum == 2
        assert points["rag_rerank.wait.duration"][0].count == 1

    def test_off_is_the_default(self):
        """Nothing of OpenTelemetry is imported, nor needed."""
        score = "import sys; from tests.scorers import WordOverlap; WordOverlap().score('a', ['b'])"
        subprocess.run([sys.executable, "-c", f"{score}; assert 'opentelemetry' not in sys.modules"], check=True)
