"""Documents longer than the model's window, read in passages: all of the text, and the score of the best."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rag_rerank import BackendRejected, ConfigError, LocalScorer
from rag_rerank.embedded import collection_folder
from rag_rerank.evaluation import Collection
from rag_rerank.inputs.cleaning import clean
from rag_rerank.local.loading import load
from rag_rerank.local.models.passages import MIN_SPACE, passages
from tests.causal_models import make_decoder_classifier
from tests.encoder_models import make_bi_encoder, make_colbert
from tests.models import make_bert_cross_encoder, word_piece_tokenizer
from tests.pairs import largest_difference

QUERY = "How do I copy a file?"
TEMPLATE = (
    'Q: {{ (messages | selectattr("role", "eq", "query") | first).content }}\n'
    'D: {{ (messages | selectattr("role", "eq", "document") | first).content }}\nA:'
)
WORDS = [
    "file",
    "copy",
    "the",
    "shutil.copy",
    "directory-tree",
    "naïve",
    "日本語",
    "🎉",
    "x" * 30,
    "a",
    "…",
    "\n",
    "[SEP]",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_piece_tokenizer()


def count(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])


class TestPassages:
    """Pieces of the text that overlap by half."""

    @given(st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=120), st.integers(MIN_SPACE, 80))
    def test_pieces_of_the_text_that_fit(self, tokenizer: PreTrainedTokenizerFast, words: list[str], size: int):
        """As they stand in it, from its beginning to its end; cut within a word they may be a token or two longer."""
        text = " ".join(words)
        pieces = passages(tokenizer, text, size)
        if count(tokenizer, text) <= size:
            assert pieces == [text]
            return
        assert len(pieces) > 1
        assert all(piece in text and count(tokenizer, piece) <= size + 2 for piece in pieces)
        offsets = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        assert text[offsets[0][0] :].startswith(pieces[0])
        assert text[: offsets[-1][1]].endswith(pieces[-1])

    @given(st.integers(0, 400), st.integers(MIN_SPACE, 80))
    def test_together_they_are_the_text(self, tokenizer: PreTrainedTokenizerFast, length: int, size: int):
        """Each begins where half of the one before it is over; the last one may begin earlier, to be as long."""
        text = " ".join("abcdefghijklmnopqrstuvwxyz"[number % 26] for number in range(length))  # a token a letter
        pieces = passages(tokenizer, text, size)
        if length <= size:
            assert pieces == [text]
            return
        assert all(len(piece) == 2 * size - 1 for piece in pieces)
        for piece, following in pairwise(pieces[:-1]):
            assert following.startswith(piece[2 * (size // 2) :])
        assert len(pieces) == 1 + -(-(length - size) // (size // 2))
        assert text.startswith(pieces[0])
        assert text.endswith(pieces[-1])

    def test_each_word_is_read_with_what_is_around_it(self, tokenizer: PreTrainedTokenizerFast):
        """What one passage has at its edge, another has in its middle."""
        words = [f"w{number}" for number in range(200)]
        pieces = passages(tokenizer, " ".join(words), 60)
        for first, second in pairwise(words):
            assert any(f"{first} {second}" in piece for piece in pieces)

    def test_no_text_has_one_passage(self, tokenizer: PreTrainedTokenizerFast):
        """The empty one."""
        assert passages(tokenizer, "", 40) == [""]


MAKERS: dict[str, tuple[Callable[[Path], Path], dict[str, object]]] = {
    "cross-encoder": (make_bert_cross_encoder, {"use_activation": False}),
    "decoder": (
        lambda folder: make_decoder_classifier(folder, "qwen3"),
        {"template": TEMPLATE, "use_activation": False},
    ),
    "bi-encoder": (lambda folder: make_bi_encoder(folder, "mean_tokens"), {}),
    "late interaction": (make_colbert, {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind."""
    return {kind: make(tmp_path_factory.mktemp("passages") / "m") for kind, (make, _) in MAKERS.items()}


@pytest.fixture(scope="module")
def long_texts() -> list[str]:
    """Real ones, each of several: 200 to 900 tokens."""
    texts = list(Collection.load(collection_folder()).documents.values())
    return ["\n".join(texts[start : start + 2 + start % 5]) for start in range(0, 80, 10)]


def scorers(folder: Path, **options: object) -> tuple[LocalScorer, LocalScorer]:
    """One that reads passages, and one that cuts."""
    options = {"dtype": "float32", **options}
    return LocalScorer(folder, long_documents="max-passage", **options), LocalScorer(folder, **options)


class TestScores:
    """Of every kind of model."""

    @pytest.fixture(params=MAKERS)
    def kind(self, request: pytest.FixtureRequest) -> str:
        return request.param

    def test_a_long_document_scores_as_its_best_passage(
        self, kind: str, folders: dict[str, Path], long_texts: list[str]
    ):
        """To 1e-6 of the largest score that any passage has as a document of its own."""
        by_passage, cut = scorers(folders[kind], **MAKERS[kind][1])
        with by_passage, cut:
            model = load(cut._settings)
            tokenizer = AutoTokenizer.from_pretrained(folders[kind])
            [room] = model.score_type.document_space([QUERY])
            pieces = [passages(tokenizer, text, room) for text in long_texts]
            assert max(map(len, pieces)) > 3
            expected = [max(cut.score(QUERY, each)) for each in pieces]
            scores = by_passage.score(QUERY, long_texts)
            assert scores == pytest.approx(expected, abs=1e-6, rel=1e-6)
            assert largest_difference(scores, cut.score(QUERY, long_texts)) > 1e-3

    def test_each_query_has_its_own_room(self, kind: str, folders: dict[str, Path], long_texts: list[str]):
        """And a query each is the same as one query at a time."""
        by_passage, cut = scorers(folders[kind], **MAKERS[kind][1])
        queries = [f"{QUERY} {'more ' * number}" for number in range(len(long_texts))]
        with by_passage, cut:
            one_by_one = [by_passage.score(*pair)[0] for pair in zip(queries, long_texts, strict=True)]
            assert by_passage.score(queries, long_texts) == pytest.approx(one_by_one, abs=1e-5)

    def test_a_short_document_scores_as_ever(self, kind: str, folders: dict[str, Path]):
        """It is its own and only passage."""
        by_passage, cut = scorers(folders[kind], **MAKERS[kind][1])
        with by_passage, cut:
            short = ["", "a", "Use shutil.copy.", "naïve 日本語", "word " * 30]
            assert by_passage.score(QUERY, short) == cut.score(QUERY, short)

    def test_long_and_short_ones_in_any_order(self, kind: str, folders: dict[str, Path], long_texts: list[str]):
        """Each document has its own passages' score."""
        by_passage, _ = scorers(folders[kind], **MAKERS[kind][1])
        mixed = [text for pair in zip(long_texts, "abcdefgh", strict=True) for text in pair]
        with by_passage:
            expected = [by_passage.score(QUERY, text)[0] for text in mixed]
            assert by_passage.score(QUERY, mixed) == pytest.approx(expected, abs=1e-5)


class TestRoom:
    """What passages have beside the query."""

    def test_a_query_that_leaves_too_little_is_cut_as_ever(self, folders: dict[str, Path], long_texts: list[str]):
        """Passages of a few words say nothing."""
        by_passage, cut = scorers(folders["cross-encoder"])
        query = "file " * 80
        with by_passage, cut:
            assert load(cut._settings).score_type.document_space([query])[0] < MIN_SPACE
            assert by_passage.score(query, long_texts) == pytest.approx(cut.score(query, long_texts), abs=1e-6)

    def test_a_query_without_any_room_is_still_refused_by_a_decoder(self, folders: dict[str, Path]):
        """As without passages."""
        by_passage, _ = scorers(folders["decoder"], template=TEMPLATE)
        with by_passage, pytest.raises(BackendRejected, match="max_tokens_per_query"):
            by_passage.score("word " * 2000, ["a"])

    @pytest.mark.parametrize("query", ["copy", "[SEP] [CLS] " * 5, "<|im_end|>" * 5, "日本語 naïve"])
    @pytest.mark.parametrize("kind", ["cross-encoder", "decoder"])
    def test_a_passage_of_its_size_fits(self, kind: str, query: str, folders: dict[str, Path]):
        """Beside any query, uncut; of one that is longer as much is read, or in a pair until the window is full."""
        with LocalScorer(folders[kind], **MAKERS[kind][1]) as scorer:
            model = load(scorer._settings)
        query = clean(query)  # as every scorer does first
        [room] = model.score_type.document_space([query])
        limit = model.score_type.prompts.max_length
        lengths = [room - 4, room, room + 20]
        shorter, fitting, over = (
            len(each.ids) for each in model.inputs([query], ["a" + " a" * (length - 1) for length in lengths]).sequences
        )
        assert fitting == shorter + 4
        assert limit - 2 <= fitting <= limit
        assert over == (fitting if kind == "decoder" else limit)

    def test_limits_of_the_caller_come_first(self, folders: dict[str, Path], long_texts: list[str]):
        """A document cut at 60 tokens has no more passages than that."""
        limits = {"max_tokens_per_doc": 60, "max_tokens_per_query": 5}
        by_passage, cut = scorers(folders["cross-encoder"], **limits)
        with by_passage, cut:
            assert by_passage.score(QUERY, long_texts) == pytest.approx(cut.score(QUERY, long_texts), abs=1e-6)

    def test_a_prompt_for_documents_is_before_each_passage(self, folders: dict[str, Path], long_texts: list[str]):
        """The model was trained with it: a passage is a document to it."""
        by_passage, cut = scorers(folders["bi-encoder"], document_prompt="passage: ")
        with by_passage, cut:
            tokenizer = AutoTokenizer.from_pretrained(folders["bi-encoder"])
            [room] = load(cut._settings).score_type.document_space([QUERY])
            room -= count(tokenizer, "passage: ")
            expected = [max(cut.score(QUERY, passages(tokenizer, text, room))) for text in long_texts]
            assert by_passage.score(QUERY, long_texts) == pytest.approx(expected, abs=1e-5)


class TestLocalScorer:
    """As users meet it."""

    def test_what_is_relevant_at_the_very_end_is_found(self, minilm: Path):
        """The real MiniLM, to which the beginning says nothing."""
        by_passage, cut = scorers(minilm)
        document = "Bananas are yellow and taste sweet. " * 80 + "Paris is the capital of France."
        with by_passage, cut:
            [found], [missed] = (scorer.score("capital of France", document) for scorer in (by_passage, cut))
        assert found > missed + 0.1

    def test_a_value_that_is_none_of_them_is_refused_at_construction(self):
        """With those that there are."""
        with pytest.raises(ConfigError, match="long_documents must be one of truncate, max-passage; got 'split'"):
            LocalScorer(long_documents="split")
