"""An instruction of a call's own: the same as a scorer that was made with it, and never another call's."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PillowImage

from rag_rerank import ConfigError, Content, Image, LocalScorer
from tests.causal_models import make_causal_lm, make_decoder_classifier
from tests.encoder_models import make_bi_encoder, make_colbert
from tests.models import make_bert_cross_encoder
from tests.pairs import largest_difference
from tests.vision_models import NAME, make_vision_reranker, picture

QUERY, DOCUMENTS = "How do I copy a file?", ["Use cp.", "Bread needs flour.", "Use cp.", "word " * 2000, ""]
INSTRUCTIONS = ["Find bread.", "Find the answer to the question in the passage, word by word.", "i", ""]
NO_PLACE = (
    'Q: {{ (messages | selectattr("role", "eq", "query") | first).content }}\n'
    'D: {{ (messages | selectattr("role", "eq", "document") | first).content }}\nA:'
)
MAKERS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "causal": (
        lambda folder: make_causal_lm(folder, "qwen3"),
        {"template": "qwen3-reranker", "classifier_tokens": ("no", "yes")},
    ),
    "classifier": (lambda folder: make_decoder_classifier(folder, "qwen3"), {"template": "qwen3-reranker"}),
    "passages": (
        lambda folder: make_decoder_classifier(folder, "qwen3"),
        {"template": "qwen3-reranker", "long_documents": "max-passage", "max_tokens_per_query": 50},
    ),
    "cross-encoder": (make_bert_cross_encoder, {"template": '{{ instruction | default("Judge.") }}' + NO_PLACE}),
}
LOGITS = {"dtype": "float32", "use_activation": False}


@pytest.fixture(scope="module", params=MAKERS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    make, options = MAKERS[request.param]
    return make(tmp_path_factory.mktemp("instruction") / "m"), {**LOGITS, **options}


@pytest.fixture(scope="module")
def expected(made: tuple[Path, dict[str, Any]]) -> dict[str | None, list[float]]:
    """What scorers say that were made with each instruction."""
    folder, options = made
    scores: dict[str | None, list[float]] = {}
    for instruction in (None, *INSTRUCTIONS):
        with LocalScorer(folder, instruction=instruction, **options) as scorer:
            scores[instruction] = scorer.score(QUERY, DOCUMENTS)
    return scores


def check(scores: list[float], expected: list[float]) -> None:
    assert largest_difference(scores, expected) <= 2e-5


class TestSameAsAScorersOwn:
    """Each call by itself, beside others, and asynchronously."""

    def test_one_after_the_other(self, made: tuple[Path, dict[str, Any]], expected: dict[str | None, list[float]]):
        """Whatever the scorer's own is; without one, the scorer's own."""
        folder, options = made
        with LocalScorer(folder, instruction="The scorer's own.", **options) as scorer:
            own = scorer.score(QUERY, DOCUMENTS)
            for instruction in INSTRUCTIONS:
                check(scorer.score(QUERY, DOCUMENTS, instruction=instruction), expected[instruction])
            assert scorer.score(QUERY, DOCUMENTS) == own
        assert largest_difference(expected["Find bread."], expected[None]) > 1e-3

    def test_beside_each_other(self, made: tuple[Path, dict[str, Any]], expected: dict[str | None, list[float]]):
        """Calls of one query with several instructions share batches, and no prefix that they have not in common."""
        folder, options = made
        wanted = [None, *INSTRUCTIONS] * 4
        with LocalScorer(folder, **options) as scorer, ThreadPoolExecutor(len(wanted)) as pool:
            scorer.warmup()
            all_scores = list(pool.map(lambda each: scorer.score(QUERY, DOCUMENTS, instruction=each), wanted))
        for instruction, scores in zip(wanted, all_scores, strict=True):
            check(scores, expected[instruction])

    def test_in_an_event_loop(self, made: tuple[Path, dict[str, Any]], expected: dict[str | None, list[float]]):
        """Gathered; rerank and rerank_batch, too."""
        folder, options = made

        async def gathered(scorer: LocalScorer) -> list[list[float]]:
            return await asyncio.gather(
                *(scorer.ascore(QUERY, DOCUMENTS, instruction=instruction) for instruction in INSTRUCTIONS)
            )

        with LocalScorer(folder, **options) as scorer:
            for instruction, scores in zip(INSTRUCTIONS, asyncio.run(gathered(scorer)), strict=True):
                check(scores, expected[instruction])
            ranked = scorer.rerank_batch([QUERY, QUERY], [DOCUMENTS] * 2, instruction="Find bread.")
        for each in ranked:
            scores = [one.score or 0.0 for one in sorted(each, key=lambda one: one.index)]
            check(scores, expected["Find bread."])

    def test_it_wins_over_one_among_the_variables(
        self, made: tuple[Path, dict[str, Any]], expected: dict[str | None, list[float]]
    ):
        """As with a server: the call's is the nearest."""
        folder, options = made
        with LocalScorer(folder, chat_template_kwargs={"instruction": "other"}, **options) as scorer:
            check(scorer.score(QUERY, DOCUMENTS, instruction="Find bread."), expected["Find bread."])


def test_of_a_model_that_reads_images(tmp_path: Path):
    """Instructions beside each other, with the same images as documents and as the query."""
    folder, instructions = make_vision_reranker(tmp_path / NAME), INSTRUCTIONS[:3]
    images: list[PillowImage.Image] = [picture(64, 64, 1), picture(64, 96, 2)]
    documents = [Content(Image(image)) for image in images] + ["text", Content(Image(images[0]), "text")]
    queries = ["What is it?", Content(Image(images[1]), "like this")]
    expected = {}
    for instruction in instructions:
        with LocalScorer(folder, instruction=instruction, **LOGITS) as own:
            expected[instruction] = [own.score(query, documents) for query in queries]

    async def gathered(scorer: LocalScorer) -> list[list[float]]:
        calls = [(query, instruction) for instruction in instructions for query in queries]
        return await asyncio.gather(
            *(scorer.ascore(query, documents, instruction=instruction) for query, instruction in calls)
        )

    with LocalScorer(folder, **LOGITS) as scorer:
        scores = iter(asyncio.run(gathered(scorer)))
        for instruction in instructions:
            for wanted in expected[instruction]:
                assert largest_difference(next(scores), wanted) <= 1e-4
        assert scorer.accepts_images


class TestNoPlace:
    """Refused with a name, before anything is scored."""

    @pytest.mark.parametrize(
        ("make", "options", "words"),
        [
            (make_bert_cross_encoder, {}, "m', without a template, has no place for an instruction"),
            (lambda folder: make_bi_encoder(folder, "mean_tokens"), {}, "m', without a template, has no place"),
            (make_colbert, {}, "m', without a template, has no place"),
            (lambda folder: make_decoder_classifier(folder, "qwen3"), {"template": None}, "m', without a template"),
            (
                lambda folder: make_decoder_classifier(folder, "qwen3"),
                {"template": NO_PLACE},
                r"the template '\(text\)' has no place for an instruction",
            ),
        ],
        ids=["cross-encoder", "bi-encoder", "late interaction", "plain pair", "template"],
    )
    def test_is_a_wrong_setting(
        self, make: Callable[[Path], Path], options: dict[str, Any], words: str, tmp_path: Path
    ):
        """Sync, async, and under passthrough, also the scorer's own; without one the model scores."""
        with LocalScorer(make(tmp_path / "m"), **options) as scorer:
            with pytest.raises(ConfigError, match=words):
                scorer.score("q", ["a", "b"], instruction="i")
            with pytest.raises(ConfigError, match=words):
                asyncio.run(scorer.ascore("q", ["a", "b"], instruction="i"))
            with pytest.raises(ConfigError, match=words):
                scorer.rerank_batch(["q", "r"], [["a"], ["b"]], instruction="i", on_error="passthrough")
            assert len(scorer.score("q", ["a", "b"])) == 2
        with LocalScorer(tmp_path / "m", instruction="i", **options) as scorer, pytest.raises(ConfigError, match=words):
            scorer.score("q", ["a", "b"])
