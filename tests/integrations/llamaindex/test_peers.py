"""Beside the reranker that most people use today: the same weights give the same order and the same scores."""

import asyncio
import json
import random
from pathlib import Path

import pytest
from llama_index.core.postprocessor import SentenceTransformerRerank
from llama_index.core.schema import NodeWithScore, TextNode

from llama_index.postprocessor.rag_rerank import LocalReranker
from tests.integrations.llamaindex.support import ids, scores
from tests.models import CORPUS


@pytest.fixture(scope="module")
def queries() -> list[str]:
    path = CORPUS.parent / "queries.jsonl"
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()[:5]]


def passages(seed: int) -> list[NodeWithScore]:
    """Forty passages of the embedded collection, as far as the tiny model reads them, under a title as metadata."""
    rows = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    chosen = random.Random(seed).sample(rows, 40)  # noqa: S311 - no secret
    nodes = [TextNode(text=row["text"][:60], id_=row["_id"], metadata={"title": row["title"][:20]}) for row in chosen]
    return [NodeWithScore(node=node, score=1.0 - rank / 100) for rank, node in enumerate(nodes)]


def test_it_ranks_as_sentence_transformers_does(cross_encoder: Path, queries: list[str]) -> None:
    """Real questions, sync and async."""
    theirs = SentenceTransformerRerank(model=str(cross_encoder), top_n=40, device="cpu")
    with LocalReranker(model=cross_encoder, top_n=40, dtype="float32", device="cpu") as ours:
        for seed, query in enumerate(queries):
            reference = theirs.postprocess_nodes(passages(seed), query_str=query)
            for results in (
                ours.postprocess_nodes(passages(seed), query_str=query),
                asyncio.run(ours.apostprocess_nodes(passages(seed), query_str=query)),
            ):
                assert ids(results) == ids(reference)
                assert scores(results) == pytest.approx(scores(reference), abs=1e-5)
                assert len(set(scores(results))) > 30
