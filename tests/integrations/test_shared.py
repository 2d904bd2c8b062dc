"""One scorer for both frameworks at once: one loaded model, the same scores, and event loops that go on."""

import asyncio
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.runnables import ConfigurableField, RunnableConfig, RunnableLambda
from llama_index.core.schema import NodeWithScore, TextNode

import langchain_rag_rerank as langchain
import llama_index.postprocessor.rag_rerank as llama_index
import rag_rerank.local.scorer
from rag_rerank import Calibrated, ConfigError, FallbackScorer, LocalScorer, RerankError, VLLMScorer
from rag_rerank.calibration import Curve
from tests.faulty_server import FaultyServer
from tests.models import CORPUS
from tests.scorers import held
from tests.test_calibration import PLATT, STEPS, calibration

QUERY = "why are python strings immutable"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real ones, some of them several times: ties."""
    documents = [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()[::30]]
    return documents + documents[:5]


@pytest.fixture(scope="module")
def scorer(cross_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalScorer]:
    """One model, under a name of its own."""
    folder = tmp_path_factory.mktemp("models") / "shared"
    folder.symlink_to(cross_encoder)
    with LocalScorer(folder, dtype="float32") as scorer:
        yield scorer


class Both:
    """A reranker of each framework over one scorer."""

    def __init__(self, scorer: LocalScorer, texts: list[str]) -> None:
        self.of_langchain = langchain.ScorerReranker(scorer=scorer, top_n=None)
        self.of_llama_index = llama_index.ScorerReranker(scorer=scorer, top_n=None)
        self.documents = [Document(text, metadata={"n": n}) for n, text in enumerate(texts)]
        self.nodes = [NodeWithScore(node=TextNode(text=text, id_=str(n))) for n, text in enumerate(texts)]

    async def ask_langchain(self) -> list[tuple[int, float]]:
        results = await self.of_langchain.acompress_documents(self.documents, QUERY)
        return [(result.metadata["n"], result.metadata["relevance_score"]) for result in results]

    async def ask_llama_index(self) -> list[tuple[int, float]]:
        results = await self.of_llama_index.apostprocess_nodes(self.nodes, query_str=QUERY)
        return [(int(result.node.node_id), result.score) for result in results]


def test_both_frameworks_give_the_same_scores_at_the_same_time(scorer: LocalScorer, texts: list[str]):
    """In one event loop, in the same order, and with one thread that runs the model."""
    both = Both(scorer, texts)
    expected = [(place.index, place.score) for place in scorer.rerank(QUERY, texts)]

    async def ask() -> list[list[tuple[int, float]]]:
        return await asyncio.gather(*(call() for _ in range(4) for call in (both.ask_langchain, both.ask_llama_index)))

    for results in asyncio.run(ask()):
        assert [n for n, _ in results] == [n for n, _ in expected]
        assert [score for _, score in results] == pytest.approx([score for _, score in expected], abs=1e-6)
    assert [thread.name for thread in threading.enumerate()].count(f"rag_rerank {scorer.model_name}") == 1


def test_fifty_calls_at_once_do_not_stall_the_event_loop(
    scorer: LocalScorer, texts: list[str], monkeypatch: pytest.MonkeyPatch
):
    """It turns while all of them wait for the model, which runs when the loop says so."""
    both, go = Both(scorer, texts), held(scorer, monkeypatch)

    async def ask() -> list[list[tuple[int, float]]]:
        calls = asyncio.gather(*(call() for _ in range(25) for call in (both.ask_langchain, both.ask_llama_index)))
        for _ in range(500):
            await asyncio.sleep(0)
        assert not calls.done()
        go.set()
        return await calls

    assert [len(results) for results in asyncio.run(ask())] == [len(texts)] * 50


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The settings of each model that is loaded."""
    load, loaded = rag_rerank.local.scorer._load, []
    monkeypatch.setattr(rag_rerank.local.scorer, "_load", lambda settings: loaded.append(settings) or load(settings))
    return loaded


INPUTS = [{"query": f"query {n}", "documents": [Document(f"text {n}"), Document("bread")]} for n in range(24)]


def test_rerankers_with_equal_settings_load_one_model(cross_encoder: Path, loads: list[object]):
    """In both frameworks, however they came about, until the last one is closed."""
    settings: dict[str, Any] = {"model": str(cross_encoder), "dtype": "float32", "max_length": 64}
    chains = [langchain.LocalReranker(**settings, top_n=n) for n in (1, 2)]
    engines = [llama_index.LocalReranker(**settings, top_n=n) for n in (1, 2)]
    chains += [chains[0].model_copy(update={"top_n": 3}), pickle.loads(pickle.dumps(chains[0]))]  # noqa: S301
    engines += [llama_index.LocalReranker.from_dict(engines[0].to_dict())]
    nodes = [NodeWithScore(node=TextNode(text="bread"))]
    for chain, engine in zip(chains, [*engines, engines[0]], strict=True):
        assert len(chain.compress_documents([Document("bread")], QUERY)) == 1
        assert len(engine.postprocess_nodes(nodes, query_str=QUERY)) == 1
    assert len(loads) == 1
    for each in [*chains, *engines[1:]]:
        each.close()
    assert len(engines[0].postprocess_nodes(nodes, query_str=QUERY)) == 1
    engines[0].close()
    assert len(loads) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_a_batch_with_a_setting_per_call_loads_one_model(cross_encoder: Path, loads: list[object], is_async: bool):
    """LangChain makes an instance for each call (`configurable_fields`)."""
    with langchain.LocalReranker(model=str(cross_encoder), dtype="float32", max_length=32) as reranker:
        chain = reranker.configurable_fields(top_n=ConfigurableField(id="top_n"))
        configs: list[RunnableConfig] = [{"configurable": {"top_n": 1 + n % 2}} for n in range(24)]
        results = asyncio.run(chain.abatch(INPUTS, configs)) if is_async else chain.batch(INPUTS, configs)
    assert [len(result) for result in results] == [1, 2] * 12
    assert len(loads) == 1


def test_one_connection_pool_for_equal_settings():
    """Four rerankers of two frameworks, and a batch with a setting per call, send all over one connection."""
    with FaultyServer() as server:
        settings: dict[str, Any] = {"base_url": server.base_url, "top_n": 1}
        chains = [langchain.VLLMReranker(**settings) for _ in range(2)]
        engines = [llama_index.VLLMReranker(**settings) for _ in range(2)]
        for chain, engine in zip(chains, engines, strict=True):
            assert len(chain.compress_documents([Document("a"), Document("b")], QUERY)) == 1
            assert len(engine.postprocess_nodes([NodeWithScore(node=TextNode(text="a"))], query_str=QUERY)) == 1
        chain = chains[0].configurable_fields(top_n=ConfigurableField(id="top_n"))
        one_at_a_time: RunnableConfig = {"max_concurrency": 1, "configurable": {"top_n": 2}}
        assert [len(result) for result in chain.batch(INPUTS, one_at_a_time)] == [2] * 24
        assert {request.connection for request in server.requests} == {1}
        assert len(server.score_requests) == 28
        assert len(server.requests) - 28 <= 3, "what is asked about the server is asked once"


def test_one_calibration_file_serves_both_frameworks(scorer: LocalScorer, texts: list[str], tmp_path: Path):
    """The same probabilities, threshold and cut-off, from a file that is named in the settings."""
    file = tmp_path / "relevance.json"
    calibration(scorer, scale="logit").save(file)
    settings = {"model": scorer.model_name, "dtype": "float32", "calibration": file, "top_n": None}
    with Calibrated(LocalScorer(scorer.model_name, dtype="float32"), file) as calibrated:
        scores = calibrated.score(QUERY, texts)
    middle = sorted(scores)[len(scores) // 2]
    for limits in ({}, {"score_threshold": middle}, {"min_precision": middle, "min_n": 2}):
        with Calibrated(LocalScorer(scorer.model_name, dtype="float32"), file) as calibrated:
            right = [(each.index, each.score) for each in calibrated.rerank(QUERY, texts, **limits)]
        with (
            langchain.LocalReranker(**settings, **limits) as of_langchain,
            llama_index.LocalReranker(**settings, **limits) as of_llama_index,
        ):
            assert of_langchain.scorer is of_llama_index.scorer
            documents = [Document(text, metadata={"n": n}) for n, text in enumerate(texts)]
            found = of_langchain.compress_documents(documents, QUERY)
            ranked = [(each.metadata["n"], each.metadata["relevance_score"]) for each in found]
            nodes = [NodeWithScore(node=TextNode(text=text, id_=str(n))) for n, text in enumerate(texts)]
            results = of_llama_index.postprocess_nodes(nodes, query_str=QUERY)
        for of_framework in (ranked, [(int(each.node.node_id), each.score) for each in results]):
            assert [index for index, _ in of_framework] == [index for index, _ in right]
            assert [score for _, score in of_framework] == pytest.approx([score for _, score in right], abs=1e-6)


def test_calibrated_and_plain_components_share_the_model(cross_encoder: Path, loads: list[object], tmp_path: Path):
    """It is closed with the last of them, whichever that is; each calibration is its own."""
    with LocalScorer(cross_encoder, dtype="float32", max_length=48) as fitted:
        for name, curve in (("a", PLATT), ("b", STEPS)):
            calibration(fitted, curve, scale="logit").save(tmp_path / name)
    loads.clear()
    settings: dict[str, Any] = {"model": str(cross_encoder), "dtype": "float32", "max_length": 48}
    for closed_last in range(3):
        files = [None, tmp_path / "a", tmp_path / "b"]
        components: list[Any] = [langchain.LocalReranker(**settings, calibration=file) for file in files]
        components += [llama_index.LocalReranker(**settings, calibration=file) for file in files]
        scores = [each.scorer.score(QUERY, ["bread"]) for each in components]
        assert scores[:3] == scores[3:]
        assert len({score for (score,) in scores}) == 3
        last = components.pop(closed_last)
        for each in components:
            each.close()
        assert last.scorer.score(QUERY, ["bread"]) == scores[closed_last]
        assert len(loads) == 1 + closed_last
        model = last.scorer
        last.close()
        with pytest.raises(RerankError, match="closed"):
            model.score(QUERY, ["bread"])


def test_one_threshold_holds_for_whichever_scorer_answers(scorer: LocalScorer, tmp_path: Path):
    """A server and a model, each calibrated: what LangChain's retriever and LlamaIndex keep has p >= 0.5."""
    documents, files = ["a b", "a", "c"], [tmp_path / "server.json", tmp_path / "local.json"]
    with FaultyServer() as server:
        with VLLMScorer(server.base_url) as remote:
            calibration(remote, Curve("platt", [(0.0, -1.0), (1.0, 1.0)])).save(files[0])
            raw = remote.score("a b", documents)
        middle = sorted(scorer.score("a b", documents))[1]
        calibration(scorer, Curve("platt", [(middle - 1, -4.0), (middle + 1, 4.0)])).save(files[1])
        local = LocalScorer(scorer.model_name, dtype="float32")
        both = FallbackScorer(
            Calibrated(VLLMScorer(server.base_url, max_retries=0), files[0]), Calibrated(local, files[1])
        )
        right = [{text for text, score in zip(documents, raw, strict=True) if score >= 0.5}]
        right += [{text for text in documents if scorer.score("a b", text)[0] >= middle}]
        found = RunnableLambda(lambda query: [Document(text) for text in documents])
        reranker = langchain.ScorerReranker(scorer=both, score_threshold=0.5, top_n=None)
        retriever = reranker.as_retriever(found)
        processor = llama_index.ScorerReranker(scorer=both, score_threshold=0.5, top_n=None)
        nodes = [NodeWithScore(node=TextNode(text=text)) for text in documents]
        with both:
            for kept in right:
                ranked = retriever.invoke("a b")
                assert {each.page_content for each in ranked} == kept
                assert all(0.5 <= each.metadata["relevance_score"] <= 1 for each in ranked)
                assert {each.node.text for each in processor.postprocess_nodes(nodes, query_str="a b")} == kept
                assert retriever.invoke("a b", min_precision=0.5, score_threshold=None)
                server.kill()


@pytest.mark.parametrize("framework", [langchain, llama_index])
def test_a_calibration_that_is_none_is_told_at_construction(framework: Any, scorer: LocalScorer):
    with pytest.raises(ConfigError, match=r"nowhere\.json can't be read"):
        framework.LocalReranker(model=scorer.model_name, calibration="nowhere.json")
