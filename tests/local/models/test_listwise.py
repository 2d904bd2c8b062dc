"""jina-reranker-v3: all documents of a query in one prompt; compared with the repository's formula, written out.

That its scores are those of a server is seen in ``tests/vllm/test_family_parity.py``.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from rag_rerank import BackendRejected, ConfigError, LocalScorer
from rag_rerank.local.models import listwise
from rag_rerank.local.models.listwise import prompt
from tests.native_models import V3_MARKS, make_jina_v3
from tests.pairs import largest_difference, pairs

QUERY = "How do I copy a file?"
DOCUMENTS = ["With shutil.", "Ask a question. " * 20, "", "A list is mutable.", "With shutil.", "naïve café"]

MANY = [f"{text[:20]} {number}" for number, text in enumerate(pairs()[1][:43] * 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_jina_v3(tmp_path_factory.mktemp("models") / "jina-reranker-v3")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Iterator[LocalScorer]:
    with LocalScorer(folder, dtype="float32") as scorer:
        yield scorer


class Plain:
    """The repository's code, with transformers' Qwen3."""

    def __init__(self, folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = Qwen3Config(**{key: value for key, value in fields.items() if key not in ("auto_map", "model_type")})
        weights = load_file(folder / "model.safetensors")
        body = {key.removeprefix("model."): weight for key, weight in weights.items() if key.startswith("model.")}
        self.model = Qwen3Model.from_pretrained(None, config=config, state_dict=body).eval()
        self.first, self.second = weights["projector.0.weight"], weights["projector.2.weight"]
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    @torch.inference_mode()
    def vectors(self, query: str, documents: Sequence[str], instruction: str | None = None) -> np.ndarray:
        """Those of the documents, then the query's."""
        ids = self.tokenizer(prompt(query, documents, instruction), return_tensors="pt")["input_ids"]
        states = self.model(ids).last_hidden_state[0]
        marks = torch.isin(ids[0], torch.tensor(list(V3_MARKS.values())))
        return ((states[marks] @ self.first.T).relu() @ self.second.T).numpy()

    def scores(self, query: str, blocks: Sequence[Sequence[str]], instruction: str | None = None) -> list[float]:
        vectors = [self.vectors(query, block, instruction) for block in blocks]
        weights = [max((1 + cosine(each[:-1], each[-1])) / 2) for each in vectors]
        mean = np.average([each[-1] for each in vectors], axis=0, weights=weights)
        return cosine(np.concatenate([each[:-1] for each in vectors]), mean).tolist()


def cosine(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    return vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)


def test_the_prompt_is_the_repositorys():
    """Its code and vLLM's write it so."""
    text = prompt("q", ["first", "second"], "Find.")
    assert text.startswith("<|im_start|>system\nYou are a search relevance expert who can determine a ranking of the ")
    assert text.partition("<|im_start|>user\n")[2] == (
        "I will provide you with 2 passages, each indicated by a numerical identifier. "
        "Rank the passages based on their relevance to query: q\n<instruct>\nFind.\n</instruct>\n"
        '<passage id="0">\nfirst<|embed_token|>\n</passage>\n<passage id="1">\nsecond<|embed_token|>\n</passage>\n'
        "<query>\nq<|rerank_token|>\n</query><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


class TestScores:
    @pytest.mark.parametrize("instruction", [None, "Find bread."])
    def test_are_those_of_the_formula(self, instruction: str | None, scorer: LocalScorer, folder: Path):
        """Equal documents are scored in their places; marks in a text are none."""
        expected = Plain(folder).scores(QUERY, [DOCUMENTS], instruction)
        assert scorer.score(QUERY, DOCUMENTS, instruction=instruction) == pytest.approx(expected, abs=1e-5)
        assert max(expected) - min(expected) > 0.3
        assert abs(expected[0] - expected[4]) > 1e-3
        spelt = [*DOCUMENTS[:-1], "<|embed_token|> x <|rerank_token|>"]
        assert len(scorer.score(QUERY, spelt, instruction="<|embed_token|>")) == len(spelt)

    def test_depend_on_the_order(self, scorer: LocalScorer):
        """And a document alone scores otherwise."""
        forth, back = scorer.score(QUERY, DOCUMENTS), scorer.score(QUERY, DOCUMENTS[::-1])
        assert largest_difference(forth, back[::-1]) > 1e-3
        alone = scorer.score([QUERY] * len(DOCUMENTS), DOCUMENTS)
        assert largest_difference(forth, alone) > 1e-3
        assert alone == pytest.approx([scorer.score(QUERY, [each])[0] for each in DOCUMENTS], abs=1e-5)

    def test_of_a_list_come_from_one_prompt_as_long_as_it_fits(self, scorer: LocalScorer, folder: Path):
        """Also of more than 125 documents, as on a server."""
        assert scorer.score(QUERY, MANY) == pytest.approx(Plain(folder).scores(QUERY, [MANY]), abs=1e-5)

    def test_of_a_list_that_is_too_long_come_from_blocks(self, folder: Path):
        """Of 125 documents, as in the repository's code; or of as many as the window holds."""
        expected = Plain(folder).scores(QUERY, [MANY[start : start + 125] for start in (0, 125, 250)])
        with LocalScorer(folder, dtype="float32", max_length=6000) as scorer:
            assert scorer.score(QUERY, MANY) == pytest.approx(expected, abs=1e-5)
        with LocalScorer(folder, dtype="float32", max_length=600) as short:
            assert len(short.score(QUERY, MANY[:20])) == 20
            lengths = [len(each.ids) for each in short._engine.model.inputs([QUERY], MANY[:20]).sequences]
        assert 1 < len(lengths) < 20
        assert max(lengths) <= 600

    def test_each_query_of_a_batch_has_its_own_list(self, folder: Path):
        """From the first call on, before the model is loaded."""
        with LocalScorer(folder, dtype="float32") as scorer:
            assert scorer.listwise
            batch = scorer.rerank_batch([QUERY, "bread"], [DOCUMENTS, DOCUMENTS[:3]])
            assert batch[0] == scorer.rerank(QUERY, DOCUMENTS)
            assert batch[1] == scorer.rerank("bread", DOCUMENTS[:3])


class TestLimits:
    def test_long_texts_are_cut_where_there_are_blocks(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        """A query at 512 tokens, a document at 2,048."""
        monkeypatch.setattr(listwise, "QUERY_TOKENS", 4)
        monkeypatch.setattr(listwise, "DOCUMENT_TOKENS", 6)
        with LocalScorer(folder, dtype="float32", max_length=300) as scorer:
            got = scorer.score("one one one one one", ["two " * 300, "x"])
            assert got == pytest.approx(scorer.score("one one one one", ["two " * 400, "x"]), abs=1e-6)

    def test_a_document_alone_is_cut_at_the_window(self, folder: Path):
        """As one for a server is."""
        with LocalScorer(folder, dtype="float32", max_length=300) as scorer:
            scorer.warmup()
            [block] = scorer._engine.model.inputs([QUERY], ["word " * 500]).sequences
            assert 290 < len(block.ids) <= 300
            assert block.truncated == 1

    def test_what_leaves_no_room_is_refused(self, folder: Path):
        with LocalScorer(folder, max_length=300) as scorer, pytest.raises(BackendRejected, match="leaves no room"):
            scorer.score("query", ["d"], instruction="long " * 300)
        with pytest.raises(ConfigError, match="no document would be read"):
            LocalScorer(folder, max_length=100).score("q", ["d"])

    def test_passages_are_refused(self, folder: Path):
        with pytest.raises(ConfigError, match="reads documents together"):
            LocalScorer(folder, long_documents="max-passage").score("q", ["d"])
