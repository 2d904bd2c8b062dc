"""Images in `LocalScorer`: the scores of plain transformers, alone and in batches; what is cut; what is refused."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file

from rag_rerank import BackendRejected, ConfigError, Content, ContentError, DeadlineExceeded, Image, LocalScorer, Video
from rag_rerank.inputs.multimodal import Multimodal
from rag_rerank.inputs.preparing import prepare
from rag_rerank.local.loading import load
from rag_rerank.local.models.encoding import truncate
from rag_rerank.local.models.vision.transformer import VisionTransformer
from rag_rerank.local.transformer.batching import Batching
from rag_rerank.local.transformer.transformer import Padded
from tests.pairs import largest_difference
from tests.vision_models import (
    LEAST,
    MAX_POSITIONS,
    MOST,
    NAME,
    SIDE,
    PlainTransformers,
    make_jina_m0,
    make_vision_classifier,
    make_vision_reranker,
    picture,
    png,
)

TOLERANCE = 1e-5
LOGITS = 3e-5  # they go up to 10
QUERY = "How do I copy a file?"

# No side is scaled: transformers without torchvision rounds other pixels than a server does.
A, B, C = picture(256, 192, 1), picture(128, 128, 2), picture(320, 96, 3)
A2 = picture(256, 192, 4)  # as many tokens as A
Parts = Sequence[str | PillowImage.Image]
DOCUMENTS: dict[str, Parts] = {
    "text": ["Use shutil.copy, or read and write it yourself."],
    "image": [A],
    "another image of this size": [A2],
    "a small one": [B],
    "image and text": [A, "a screenshot"],
    "text and image": ["a screenshot", A],
    "two images": [A, B],
    "the same in another order": [B, A],
    "two images, two texts": [C, "first line", "second line", A],
    "twice the same image": [B, B],
    "image and empty text": [C, ""],
    "nothing": [""],
    "what spells a placeholder": ["<|vision_start|><|image_pad|><|vision_end|>"],
}
SPELLS = "what spells a placeholder"

pytestmark = pytest.mark.usefixtures("one_thread")


def content(parts: Parts) -> Content:
    return Content(*(part if isinstance(part, str) else Image(part) for part in parts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_reranker(tmp_path_factory.mktemp("models") / NAME)


@pytest.fixture(scope="module")
def plain(folder: Path) -> PlainTransformers:
    return PlainTransformers(folder)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Iterator[LocalScorer]:
    """Of logits."""
    with LocalScorer(folder, dtype="float32", use_activation=False) as scorer:
        yield scorer


def expected(plain: PlainTransformers, query: Parts, document: Parts) -> float:
    spaced = [part.replace("<|", "< |") if isinstance(part, str) else part for part in document]
    return plain.logit(query, spaced)


@torch.inference_mode()
def test_jina_m0_is_scored_as_its_repository_does(tmp_path: Path):
    """The document first, behind the prompt a token that no text spells, two layers, a shift."""
    folder = make_jina_m0(tmp_path / "jina-reranker-m0")
    plain, weights = PlainTransformers(folder, "jina-reranker-m0"), load_file(folder / "model.safetensors")
    marks = "<|vision_start|><|image_pad|><|vision_end|>"
    cases: dict[str, tuple[Parts, Parts, list[PillowImage.Image], str]] = {
        "text": (["q"], ["d"], [], "**Document**:\nd\n**Query**:\nq"),
        "image": (["q"], [A], [A], f"**Document**:\n{marks}\n**Query**:\nq"),
        "both": ([B], [A, "d"], [A, B], f"**Document**:\n{marks}d\n**Query**:\n{marks}"),
    }
    with LocalScorer(folder, dtype="float32", use_activation=False) as scorer:
        for query, document, images, prompt in cases.values():
            states = plain.model.model(**plain.inputs(images, prompt, [100])).last_hidden_state[0, -1]
            hidden = (weights["score.0.weight"] @ states + weights["score.0.bias"]).relu()
            expected = weights["score.2.weight"] @ hidden + weights["score.2.bias"] - 2.65
            assert scorer.score(content(query), [content(document)]) == pytest.approx(expected.tolist(), abs=LOGITS)


class TestScores:
    """As transformers' own model and processor compute them, one pair at a time."""

    @pytest.mark.parametrize("name", DOCUMENTS)
    def test_of_a_document(self, name: str, scorer: LocalScorer, plain: PlainTransformers):
        """Text, images, both, several, in any order; for a query of text."""
        [score] = scorer.score(QUERY, content(DOCUMENTS[name]))
        assert score == pytest.approx(expected(plain, [QUERY], DOCUMENTS[name]), abs=LOGITS)

    @pytest.mark.parametrize("query", [[B], [B, "What is this?"], ["What is this?", A, C]])
    def test_for_a_query_with_images(self, query: Parts, scorer: LocalScorer, plain: PlainTransformers):
        """All documents in one call, which share the query's images."""
        scores = scorer.score(content(query), [content(parts) for parts in DOCUMENTS.values()])
        by_hand = [expected(plain, query, parts) for parts in DOCUMENTS.values()]
        assert largest_difference(scores, by_hand) <= LOGITS
        assert max(by_hand) - min(by_hand) > 1

    def test_is_the_probability_of_yes(self, folder: Path, plain: PlainTransformers):
        """By default: against no."""
        with LocalScorer(folder, dtype="float32") as scorer:
            scores = scorer.score(QUERY, [content(parts) for parts in DOCUMENTS.values()])
        by_hand = [expected(plain, [QUERY], parts) for parts in DOCUMENTS.values()]
        assert largest_difference(scores, torch.tensor(by_hand).sigmoid().tolist()) <= TOLERANCE

    def test_pictures_are_told_apart(self, scorer: LocalScorer):
        """Also where they have the same number of tokens, and so the same ids."""
        scores = scorer.score(QUERY, [Image(A), Image(A2), Image(A.rotate(180))])
        assert min(abs(scores[0] - scores[1]), abs(scores[0] - scores[2]), abs(scores[1] - scores[2])) > 1e-3

    def test_is_the_same_alone_and_in_a_batch(self, scorer: LocalScorer):
        """1:N, N:N with several queries, and one by one; and where one is scored twice."""
        documents = [content(parts) for parts in DOCUMENTS.values()] * 2
        queries = [QUERY, content([A, "this"]), content([A2, "this"])]
        queries = [queries[number % 3] for number in range(len(documents))]
        together = scorer.score(queries, documents)
        alone = [scorer.score(query, document)[0] for query, document in zip(queries, documents, strict=True)]
        assert largest_difference(together, alone) <= LOGITS
        for query in queries[:3]:
            one = scorer.score(query, documents)
            assert largest_difference(one[: len(DOCUMENTS)], one[len(DOCUMENTS) :]) == 0
            rows = [row for row, each in enumerate(queries) if each is query]
            assert largest_difference([one[row] for row in rows], [together[row] for row in rows]) <= LOGITS

    def test_is_the_same_in_an_event_loop_and_in_threads(self, scorer: LocalScorer):
        """Whose calls share batches."""
        documents = [content(parts) for parts in DOCUMENTS.values()]
        once = scorer.score(QUERY, documents)

        async def gathered() -> list[list[float]]:
            return await asyncio.gather(*(scorer.ascore(QUERY, documents) for _ in range(3)))

        with ThreadPoolExecutor(4) as pool:
            threads = list(pool.map(lambda _: scorer.score(QUERY, documents), range(8)))
        for again in (*asyncio.run(gathered()), *threads):
            assert largest_difference(once, again) <= LOGITS

    def test_a_picture_is_turned_as_its_camera_says(self, scorer: LocalScorer):
        """EXIF's orientation 6 is a quarter turn."""
        exif = PillowImage.Exif()
        exif[0x0112] = 6
        turned = png(A, "TIFF", exif=exif)
        scores = scorer.score(QUERY, [Image(turned), Image(A.transpose(PillowImage.Transpose.ROTATE_270)), Image(A)])
        assert scores[0] == pytest.approx(scores[1], abs=LOGITS)
        assert scores[0] != pytest.approx(scores[2], abs=1e-3)

    @pytest.mark.parametrize("size", [(300, 200), (1, 1), (40, 4000), (1500, 900), (199, 1)])
    def test_pictures_are_scaled(self, size: tuple[int, int], scorer: LocalScorer, plain: PlainTransformers):
        """To whole tokens, not too few and not too many; up to other rounding as by Pillow."""
        image = picture(*size)
        assert scorer.score(QUERY, Image(image))[0] == pytest.approx(plain.logit([QUERY], [image]), abs=0.02)

    def test_half_precision_ranks_alike(self, folder: Path, scorer: LocalScorer):
        """With bfloat16 all through."""
        documents = [content(parts) for parts in DOCUMENTS.values()]
        with LocalScorer(folder, dtype="bfloat16", use_activation=False) as half:
            assert largest_difference(half.score(QUERY, documents), scorer.score(QUERY, documents)) < 0.5

    def test_prompts_are_for_text(self, folder: Path, plain: PlainTransformers):
        """vLLM puts images before all text, and so before what must come first."""
        options = {"dtype": "float32", "use_activation": False}
        with LocalScorer(folder, document_prompt="D: ", **options) as scorer:
            [score] = scorer.score(content([B, "what"]), ["text"])
            with pytest.raises(
                ContentError, match=r"documents\[1\] holds an image, which can't follow a document_prompt"
            ):
                scorer.score("what", ["text", Image(A)])
        assert score == pytest.approx(plain.logit([B, "what"], ["D: text"]), abs=LOGITS)
        with (
            LocalScorer(folder, query_prompt="Q: ", **options) as scorer,
            pytest.raises(ContentError, match=r"queries\[0\] holds an image, which can't follow a query_prompt"),
        ):
            scorer.score(Image(A), ["text"])


class TestHead:
    """The same reranker with vLLM's head in the checkpoint, ``Qwen3VLForSequenceClassification``."""

    def test_scores_are_those_of_the_words(self, tmp_path: Path, scorer: LocalScorer):
        """The head is the difference of their rows."""
        folder = make_vision_classifier(tmp_path / "seq-cls")
        documents = [content(parts) for parts in DOCUMENTS.values()]
        options = {"template": "qwen3-vl-reranker", "dtype": "float32", "use_activation": False}
        with LocalScorer(folder, **options) as head:
            assert largest_difference(head.score(QUERY, documents), scorer.score(QUERY, documents)) <= LOGITS

    def test_a_checkpoint_without_it(self, tmp_path: Path):
        """transformers would draw it at random."""
        folder = make_vision_classifier(tmp_path / "seq-cls")
        weights = load_file(folder / "model.safetensors")
        del weights["score.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with (
            LocalScorer(folder, template="qwen3-vl-reranker") as head,
            pytest.raises(ConfigError, match=r"has no score\.weight for one label"),
        ):
            head.warmup()


class TestWork:
    """What goes through the tower, how often, and what is kept."""

    @pytest.fixture
    def model(self, folder: Path):
        return load(LocalScorer(folder, dtype="float32")._settings)

    def mixed(self, *parts: str | PillowImage.Image) -> Multimodal:
        return prepare(content(parts), "documents")

    def test_a_picture_goes_through_the_tower_once(self, model):
        """That of a query for all batches, and documents' that are equal."""
        patches: list[int] = []
        model.score_type.transformer.tower.model.register_forward_pre_hook(
            lambda _, given: patches.append(len(given[0]))
        )
        documents = [self.mixed(A), self.mixed(C, "x"), self.mixed(A, "x"), self.mixed(picture(256, 192, 1))]
        inputs = model.inputs([self.mixed(B)], documents)
        for sequence in inputs.sequences:
            model.score_type.run([sequence])
        assert sum(patches) == sum(image.width * image.height for image in (A, B, C)) // 16**2

    def test_what_the_tower_made_is_given_up_after_its_last_use(self, model):
        """A thousand pages would not fit into a GPU's memory. What a call needs again is kept."""
        inputs = model.inputs([self.mixed(B)], [self.mixed(A), self.mixed(C)])
        [query, first], [_, second] = (sequence.images for sequence in inputs.sequences)
        model.score_type.run(inputs.sequences[:1])
        assert (query.features is not None, first.features, second.features) == (True, None, None)
        model.score_type.run(inputs.sequences[1:])
        assert (query.features, second.features) == (None, None)
        del inputs, query, first, second, _
        assert len(model.score_type.transformer.tower._shared) == 0

    def test_two_threads_do_not_do_it_twice(self, model):
        """One waits for the other."""
        passes: list[int] = []
        model.score_type.transformer.tower.model.register_forward_pre_hook(lambda _, given: passes.append(1))
        sequences = model.inputs([self.mixed(A)], [str(number) for number in range(8)]).sequences
        barrier = threading.Barrier(4)

        def run(number: int) -> torch.Tensor:
            barrier.wait()
            return model.score_type.run(sequences[2 * number : 2 * number + 2])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, range(4)))
        assert len(passes) == 1

    def test_a_failure_is_not_kept(self, model):
        """The next try starts anew."""
        sequences = model.inputs(["q"], [self.mixed(A)]).sequences
        broken = model.score_type.transformer.tower.model.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.score_type.run(sequences)
        broken.remove()
        assert model.score_type.run(sequences).shape == (1, 1)

    def test_padded_batches_score_the_same(self, model):
        """Which are for devices without attention over rows."""
        documents = [self.mixed(*parts) for parts in DOCUMENTS.values() if any(p is A or p is C for p in parts)]
        sequences = model.inputs([self.mixed(B, "q")], [*documents, "text"]).sequences
        tower, decoder = model.score_type.transformer.tower, model.score_type.transformer.decoder
        in_a_row = model.score_type.run(sequences)
        decoder.set_attn_implementation("sdpa")
        body = type("Body", (), {"visual": tower.model, "language_model": decoder})
        padded = VisionTransformer.of(body, tower.processor, Padded(decoder, 0, Batching(4096)))
        with torch.inference_mode():
            states = padded.states(sequences)
        logits = model.score_type.head(states)
        assert largest_difference(logits[:, 0].tolist(), in_a_row[:, 0].tolist()) <= LOGITS

    def test_a_deadline_and_a_cancelled_task_end_it(self, folder: Path):
        """And those that come after are scored."""
        with LocalScorer(folder, dtype="float32") as scorer:
            scorer.warmup()
            pages = [Image(picture(256, 192, seed)) for seed in range(64)]
            with pytest.raises(DeadlineExceeded):
                scorer.score(QUERY, pages, deadline=0.02)

            async def cancelled() -> None:
                task = asyncio.create_task(scorer.ascore(QUERY, pages))
                await asyncio.sleep(0.02)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

            asyncio.run(cancelled())
            assert len(scorer.score(QUERY, pages[:2])) == 2


class TestCuts:
    """What is longer than the model reads."""

    LONG = "word " * 2000

    def test_text_is_cut_never_a_picture(self, folder: Path):
        """Whatever the limit: all of the picture and of the template is there, or it is said that they don't fit."""
        whole = 0
        for limit in range(130, 220, 4):
            model = load(LocalScorer(folder, dtype="float32", max_length=limit)._settings)
            document = prepare(content([A, self.LONG]), "documents")
            try:
                [sequence] = model.inputs(["q"], [document]).sequences
            except ContentError:
                assert not whole  # once it fits, it does so with more room, too
                continue
            whole += 1
            assert len(sequence.ids) <= limit
            assert len(sequence.ids) >= limit - 1
            assert sequence.truncated
            assert sum(token < 0 for token in sequence.ids) == A.width * A.height // SIDE**2
            assert model.score_type.prompts.prompts.tokenizer.decode(sequence.ids[-8:]).endswith(
                "<|im_start|>assistant\n"
            )
        assert whole > 10

    def test_the_score_is_that_of_the_beginning(self, scorer: LocalScorer, plain: PlainTransformers):
        """As much of it as fits."""
        model = load(scorer._settings)
        [sequence] = model.inputs([QUERY], [prepare(content([A, self.LONG]), "documents")]).sequences
        prompt = model.score_type.prompts.prompts.tokenizer.decode([token for token in sequence.ids if token >= 0])
        beginning = prompt.rpartition("<|vision_end|>")[2].partition("<|im_end|>")[0]
        assert self.LONG.startswith(beginning)
        assert len(sequence.ids) == MAX_POSITIONS - 1  # room is measured with a document of one token
        [score] = scorer.score(QUERY, content([A, self.LONG]))
        assert score == pytest.approx(plain.logit([QUERY], [A, beginning]), abs=LOGITS)

    def test_a_picture_that_does_not_fit_is_refused_with_advice_that_helps(self, folder: Path):
        """The position is that in the caller's list, though equal documents were scored once."""
        page = picture(700, 500)
        with LocalScorer(folder, dtype="float32", max_length=200) as scorer:
            with pytest.raises(
                ContentError, match=r"documents\[3\] holds an image of 142 tokens.*max_pixels="
            ) as caught:
                scorer.score(QUERY, ["a", "a", Image(B), Image(page)])
            pixels = int(str(caught.value).rpartition("max_pixels=")[2].rstrip(")"))
            assert len(scorer.score(QUERY, Image(page, max_pixels=pixels))) == 1
            with pytest.raises(ContentError, match=r"queries holds an image|queries\[0\] holds an image"):
                scorer.score(Image(page), ["a"])
            with pytest.raises(ContentError, match=r"documents\[1\] holds 30 images .* not even small ones"):
                scorer.score(QUERY, ["a", Content(*[Image(B)] * 30)])
            with pytest.raises(ContentError, match=r"documents\[0\] holds an image"):
                asyncio.run(scorer.ascore([content([A, "q"]), "q"], [Image(page), "a"]))

    def test_a_query_too_long_by_its_text_is_refused_as_ever(self, folder: Path):
        """The images of the document are not to blame."""
        with (
            LocalScorer(folder, dtype="float32", max_length=300) as scorer,
            pytest.raises(BackendRejected, match="a query, with its template, leaves no room .* the 300 tokens"),
        ):
            scorer.score("word " * 400, [Image(B)])

    def test_limits_for_documents_leave_their_pictures(self, folder: Path, plain: PlainTransformers):
        """Each counts as its placeholder's three tokens, as on vLLM; too low a limit cuts nothing."""
        documents = [[A, "word " * 60], [A, B, "word " * 60], [A, B, C, "word " * 60]]
        with LocalScorer(folder, dtype="float32", use_activation=False, max_tokens_per_doc=40) as scorer:
            scores = scorer.score(QUERY, [content(parts) for parts in documents])
        for parts, limit in zip(documents, (40 - 3, 40 - 6, 10**6), strict=True):
            parts[-1] = truncate(plain.tokenizer, parts[-1], limit)
        assert largest_difference(scores, [plain.logit([QUERY], parts) for parts in documents]) <= LOGITS

    def test_passages_are_of_text(self, folder: Path, plain: PlainTransformers):
        """A document with pictures is read as one."""
        with LocalScorer(
            folder, dtype="float32", use_activation=False, long_documents="max-passage", max_length=300
        ) as scorer:
            scores = scorer.score(QUERY, [content([A, "a"]), "word " * 400])
        assert scores[0] == pytest.approx(plain.logit([QUERY], [A, "a"]), abs=LOGITS)
        assert len(scores) == 2


class TestRefused:
    """What can't be read, with its position."""

    def test_nothing_is_fetched(self, scorer: LocalScorer):
        """Neither images nor videos."""
        url = "https://example.com/a.png"
        with pytest.raises(ContentError, match=r"documents\[1\] holds an address, .* fetches nothing; pass the file"):
            scorer.score(QUERY, ["a", Image(url=url)])
        with pytest.raises(ContentError, match=r"queries\[0\] holds a video"):
            scorer.score(Video(url), ["a"])
        with pytest.raises(ContentError, match=r"documents\[0\] holds an address"):
            asyncio.run(scorer.ascore(QUERY, [Content(Image(A), Image(url=url))]))

    def test_models_that_read_text_say_so(self, cross_encoder: Path, minilm: Path):
        """With the position of the first image; and text goes on being scored."""
        for folder in (cross_encoder, minilm):
            with LocalScorer(folder) as scorer:
                with pytest.raises(ContentError, match=r"documents\[2\] holds an image .* reads text only"):
                    scorer.score(QUERY, ["a", "a", Image(A)])
                with pytest.raises(ContentError, match=r"queries\[0\] holds an image .* reads text only"):
                    asyncio.run(scorer.ascore(Image(A), ["a"]))
                assert len(scorer.score(QUERY, ["a"])) == 1

    def test_ribbons(self, scorer: LocalScorer):
        """transformers and vLLM refuse them, too."""
        with pytest.raises(ContentError, match=r"documents\[1\] holds an image of 2 x 500 pixels.* 200 times as long"):
            scorer.score(QUERY, ["a", Image(picture(2, 500))])

    def test_a_placeholder_in_the_instruction(self, folder: Path):
        """There would be one image less than places for them."""
        instruction = "<|vision_start|><|image_pad|><|vision_end|> Judge."
        with (
            LocalScorer(folder, instruction=instruction) as scorer,
            pytest.raises(ContentError, match="holds a placeholder for an image"),
        ):
            scorer.score(QUERY, Image(A))

    def test_an_unknown_model_that_sees(self, tmp_path: Path):
        """Its prompt and answers are not guessed."""
        folder = make_vision_reranker(tmp_path / "some-vl")
        with LocalScorer(folder) as scorer, pytest.raises(ConfigError, match="no known reranker"):
            scorer.warmup()
        options = {"template": "qwen3-vl-reranker", "classifier_tokens": ("no", "yes"), "dtype": "float32"}
        with LocalScorer(folder, **options) as scorer:
            assert len(scorer.score(QUERY, Image(A))) == 1

    def test_a_checkpoint_without_its_processor(self, tmp_path: Path):
        """How pictures are scaled is not guessed either."""
        folder = make_vision_reranker(tmp_path / NAME)
        (folder / "preprocessor_config.json").unlink()
        with LocalScorer(folder) as scorer, pytest.raises(ConfigError, match="no preprocessor_config.json"):
            scorer.warmup()


def test_the_tests_have_pictures_that_need_no_scaling():
    """Or the comparison would be of rounding."""
    for image in (A, B, C, A2):
        assert image.width % SIDE == image.height % SIDE == 0
        assert LEAST <= image.width * image.height <= MOST
