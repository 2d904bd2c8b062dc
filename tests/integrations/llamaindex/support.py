"""What the tests of the LlamaIndex rerankers share: scorers without a model, nodes, a retriever, and logs of traces."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CBEventType
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from llama_index.postprocessor.rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from rag_rerank import BackendUnavailable, DocumentRejected, Scorer

AnyReranker = ScorerReranker | LocalReranker | VLLMReranker

QUERY = "how do giant pandas feed"
TEXTS = [
    "The stock market closed higher on Friday.",
    "The giant panda is a bear native to China.",
    "Giant pandas eat bamboo for up to fourteen hours a day.",
    "Bread is baked from flour, water and yeast.",
    "Zoo keepers feed their giant pandas bamboo shoots and fruit.",
]
ORDER = ["n4", "n2", "n1", "n0", "n3"]
"""The nodes with `TEXTS` as `KeywordScorer` ranks them for `QUERY`; its last two are a tie."""
SECRET = "sk-very-secret"
GUIDE = Path(__file__).resolve().parents[3] / "docs" / "pages" / "llama_index.md"
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing answers there


class KeywordScorer(Scorer):
    """Scores by the share of the query's words that a document has; keeps the documents of each call."""

    model_name = "keywords"

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    @property
    def calls(self) -> int:
        return len(self.seen)

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        self.seen.append(documents)
        words = set(queries[0].lower().split())
        return [len(words & set(document.lower().split())) / len(words) for document in documents]


class PickyScorer(KeywordScorer):
    """Rejects documents about bread."""

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        scores = super()._score(queries, documents, until)
        kept = [None if "Bread" in text else score for text, score in zip(documents, scores, strict=True)]
        rejected = [index for index, score in enumerate(kept) if score is None]
        if rejected:
            raise DocumentRejected("no bread", indices=rejected, scores=kept)
        return scores


class BrokenScorer(Scorer):
    """Never gives a score."""

    model_name = "broken"

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        raise BackendUnavailable("nobody is there")


class WaitingScorer(KeywordScorer):
    """Awaits the event `go` before each answer; `waiting` calls are in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.waiting = 0

    async def _ascore(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        self.waiting += 1
        try:
            await self.go.wait()
        finally:
            self.waiting -= 1
        return self._score(queries, documents, until)


class Found(BaseRetriever):
    """Finds the same nodes for every query."""

    def __init__(self, nodes: list[NodeWithScore]) -> None:
        super().__init__()
        self.nodes = nodes

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self.nodes


class EventLog(BaseEventHandler):
    """Keeps the rerank events and the input scores at the time of the start event."""

    events: list[BaseEvent] = []  # noqa: RUF012 - pydantic copies it

    def handle(self, event: BaseEvent, **kwargs: object) -> None:
        if isinstance(event, ReRankStartEvent | ReRankEndEvent):
            self.events.append(event)

    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


class CallbackLog(BaseCallbackHandler):
    """Keeps the payloads of LlamaIndex's older callbacks."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.started: list[dict] = []
        self.ended: list[dict] = []

    def on_event_start(self, event_type, payload=None, event_id="", parent_id="", **kwargs):
        if event_type == CBEventType.RERANKING:
            self.started.append(payload)
        return event_id

    def on_event_end(self, event_type, payload=None, event_id="", **kwargs):
        if event_type == CBEventType.RERANKING:
            self.ended.append(payload)

    def start_trace(self, trace_id=None): ...

    def end_trace(self, trace_id=None, trace_map=None): ...


def found(texts: list[str] = TEXTS, scores: list[float | None] | None = None) -> list[NodeWithScore]:
    scores = [1.0 - position / 10 for position in range(len(texts))] if scores is None else scores
    nodes = [TextNode(text=text, id_=f"n{position}") for position, text in enumerate(texts)]
    return [NodeWithScore(node=node, score=score) for node, score in zip(nodes, scores, strict=True)]


def ids(nodes: list[NodeWithScore]) -> list[str]:
    return [node.node_id for node in nodes]


def scores(nodes: list[NodeWithScore]) -> list[float | None]:
    return [node.score for node in nodes]


def expected(scorer: Scorer) -> tuple[list[str], list[float | None]]:
    ranked = scorer.rerank(QUERY, TEXTS)
    return [f"n{item.index}" for item in ranked], [item.score for item in ranked]


def engine(reranker: AnyReranker, nodes: list[NodeWithScore] | None = None, **options: object) -> RetrieverQueryEngine:
    """Answers with the source nodes only."""
    retriever = Found(found() if nodes is None else nodes)
    synthesizer = NoText(llm=MockLLM())  # with an LLM, for it would ask for the default one, and never use it
    return RetrieverQueryEngine(retriever, synthesizer, node_postprocessors=[reranker], **options)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event to wait on
            await asyncio.sleep(0.001)


def migrations() -> dict[str, tuple[str, str]]:
    """From the guide: code with another reranker, and with one of ours, by the other's name."""
    chapter = GUIDE.read_text(encoding="utf-8").partition("## Coming from another reranker\n")[2]
    blocks = {
        title: tuple(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
        for title, text in re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", chapter, re.DOTALL | re.MULTILINE)
    }
    return {title: pair for title, pair in blocks.items() if pair}


def made_by(code: str) -> Any:
    """The reranker that an example makes."""
    names: dict[str, Any] = {}
    exec(compile(code, str(GUIDE), "exec"), names)  # noqa: S102 - our own
    return names["reranker"]
