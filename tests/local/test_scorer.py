"""LocalScorer: the real MiniLM against sentence-transformers, and a tiny cross-encoder against transformers."""

import asyncio
import gc
import json
import math
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rag_rerank import BackendRejected, ConfigError, DeadlineExceeded, LocalScorer, Ranked
from rag_rerank.embedded import collection_folder
from rag_rerank.evaluation import Collection
from tests.causal_models import make_decoder_classifier
from tests.encoder_models import make_colbert
from tests.models import MAX_LENGTH, make_bert_cross_encoder
from tests.scorers import held

QUERY = "How do I copy a file?"


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """20 real documents of all lengths, and an empty one."""
    return [*list(Collection.load(collection_folder()).documents.values())[::33][:20], ""]


def largest_difference(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


FORKING = """
import sys
from rag_rerank import LocalScorer
from tests.forking import forked

with LocalScorer(sys.argv[1], dtype="float32") as scorer:
    expected = scorer.score("q", ["a", "b c"])

    def child():
        assert scorer.score("q", ["a", "b c"]) == expected

    assert forked(child) == 0
    assert scorer.score("q", ["a", "b c"]) == expected
"""


class TestBiEncoder:
    """The real all-MiniLM-L6-v2."""

    def test_scores_are_the_cosines_of_sentence_transformers(
        self, local: LocalScorer, minilm: Path, documents: list[str]
    ):
        """To 1e-5 in float32, over-long documents included."""
        from sentence_transformers import SentenceTransformer, util

        reference = SentenceTransformer(str(minilm), device="cpu")
        cosines = util.cos_sim(reference.encode(QUERY), reference.encode(documents))[0].tolist()
        assert largest_difference(local.score(QUERY, documents), cosines) <= 1e-5

    def test_a_known_relevant_document_wins(self, local: LocalScorer):
        """It is a real model."""
        ranked = local.rerank("capital of France", ["Bananas are yellow.", "Paris is the capital of France.", ""])
        assert ranked[0] == Ranked(1, pytest.approx(0.85, abs=0.1))

    def test_a_score_does_not_depend_on_its_company(self, local: LocalScorer, documents: list[str]):
        """Alone, with others, in another order: to 1e-5."""
        together = local.score(QUERY, documents)
        alone = [local.score(QUERY, document)[0] for document in documents]
        backwards = local.score(QUERY, documents[::-1])[::-1]
        assert largest_difference(together, alone) <= 1e-5
        assert largest_difference(together, backwards) <= 1e-5

    def test_many_queries_are_the_same_as_one_by_one(self, local: LocalScorer, documents: list[str]):
        """N:N is N times 1:1."""
        queries = [f"{QUERY} {number}" for number in range(len(documents))]
        one_by_one = [local.score(query, text)[0] for query, text in zip(queries, documents, strict=True)]
        assert largest_difference(local.score(queries, documents), one_by_one) <= 1e-5

    def test_duplicates_get_the_same_score(self, local: LocalScorer):
        """Each of them."""
        assert len(set(local.score(QUERY, ["same text"] * 5))) == 1

    def test_a_spawned_process_loads_its_own(self, local: LocalScorer):
        """The scorer goes there as a pickle."""
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            scored = pool.submit(local.score, QUERY, ["a"]).result(timeout=300)
        assert scored == pytest.approx(local.score(QUERY, ["a"]), abs=1e-6)

    def test_a_forked_child_loads_its_own(self, cross_encoder: Path):
        """The engine's thread does not survive a fork; the scorer does. In a process with no other threads than its."""
        script = [sys.executable, "-c", FORKING, str(cross_encoder)]
        run = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 0, run.stderr


class TestCrossEncoder:
    """A tiny BERT with one label."""

    def reference(self, folder: Path, queries: list[str], documents: list[str]) -> list[float]:
        """Logits of plain transformers, one pair at a time."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        options = {"truncation": "longest_first", "max_length": MAX_LENGTH, "return_tensors": "pt"}
        with torch.inference_mode():
            return [
                model(**tokenizer(text=query, text_pair=document, **options)).logits.item()
                for query, document in zip(queries, documents, strict=True)
            ]

    def test_logits_are_those_of_transformers(self, cross_encoder: Path, documents: list[str]):
        """To 1e-5, though ours ran in batches."""
        with LocalScorer(cross_encoder, dtype="float32", use_activation=False) as scorer:
            ours = scorer.score(QUERY, documents)
        expected = self.reference(cross_encoder, [QUERY] * len(documents), documents)
        assert largest_difference(ours, expected) <= 1e-5
        assert max(expected) - min(expected) > 0.5

    def test_scores_are_those_of_sentence_transformers(self, cross_encoder: Path, documents: list[str]):
        """The package that users come from, with its default activation."""
        from sentence_transformers import CrossEncoder

        documents = [document for document in documents if document]  # theirs scores "" as a second empty segment
        expected = CrossEncoder(str(cross_encoder), device="cpu").predict([(QUERY, text) for text in documents])
        with LocalScorer(cross_encoder, dtype="float32") as scorer:
            assert largest_difference(scorer.score(QUERY, documents), expected.tolist()) <= 1e-5

    def test_the_default_score_is_the_sigmoid_of_the_logit(self, cross_encoder: Path, documents: list[str]):
        """As on a vLLM server."""
        with (
            LocalScorer(cross_encoder, dtype="float32") as scorer,
            LocalScorer(cross_encoder, dtype="float32", use_activation=False) as logits,
        ):
            expected = [1 / (1 + math.exp(-logit)) for logit in logits.score(QUERY, documents)]
            assert largest_difference(scorer.score(QUERY, documents), expected) <= 1e-6

    @pytest.mark.parametrize(
        "extra",
        [
            {"problem_type": "regression"},
            {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        ],
    )
    def test_a_checkpoint_may_ask_for_logits(self, extra: dict[str, object], cross_encoder: Path, tmp_path: Path):
        """ms-marco models do: their own activation is none."""
        folder = edited(cross_encoder, tmp_path / "model", **extra)
        with LocalScorer(folder) as own, LocalScorer(folder, use_activation=False) as raw:
            assert own.score(QUERY, ["a", "b c"]) == raw.score(QUERY, ["a", "b c"])

    def test_an_activation_from_elsewhere_is_refused(self, cross_encoder: Path, tmp_path: Path):
        """A config must not name code to run."""
        folder = edited(cross_encoder, tmp_path / "model", sbert_ce_default_activation_function="os.system")
        with pytest.raises(ConfigError, match="os.system"):
            LocalScorer(folder).score("q", "d")

    def test_a_document_cannot_spell_a_special_token(self, local_cross_encoder: LocalScorer):
        """[SEP] in a text is five letters: it does not end the document."""
        engine_model = _model_of(local_cross_encoder)
        plain = engine_model.inputs(["q"], ["a [SEP] [CLS] b"]).sequences[0]
        special = set(engine_model.score_type.prompts.tokenizer.all_special_ids)
        assert sum(token in special for token in plain.ids) == 3

    def test_bfloat16_ranks_almost_as_float32(self, cross_encoder: Path, documents: list[str]):
        """Half the bits cost less than a hundredth of the score's scale."""
        with LocalScorer(cross_encoder, dtype="bfloat16") as half, LocalScorer(cross_encoder, dtype="float32") as full:
            assert largest_difference(half.score(QUERY, documents), full.score(QUERY, documents)) <= 0.02

    def test_max_length_cuts_earlier(self, cross_encoder: Path):
        """What is beyond it has no influence."""
        with LocalScorer(cross_encoder, dtype="float32", max_length=16) as scorer:
            one, other = scorer.score("q", ["word " * 50 + "a", "word " * 50 + "b"])
            assert one == pytest.approx(other, abs=1e-6)  # where in a row a sequence lies costs the last digit


def _model_of(scorer: LocalScorer):
    from rag_rerank.local.loading import load

    return load(scorer._settings)


def edited(source: Path, target: Path, **config: object) -> Path:
    """A copy of a model folder with a changed config."""
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


@pytest.mark.parametrize("kind", ["cross-encoder", "bi-encoder", "decoder", "late-interaction"])
def test_what_was_cut_is_counted_and_said_once(
    kind: str, cross_encoder: Path, minilm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """One warning with the number of texts; later calls say it more quietly, those with nothing cut not at all."""
    options = {}
    folder = minilm if kind == "bi-encoder" else cross_encoder
    if kind == "decoder":
        folder = make_decoder_classifier(tmp_path / "m", "qwen3")
        options = {"template": "qwen3-reranker"}
    if kind == "late-interaction":
        folder = make_colbert(tmp_path / "m")
    long = [f"{number} " + "word " * 3000 for number in range(3)]
    caplog.set_level("DEBUG", "rag_rerank")
    with LocalScorer(folder, **options) as scorer:
        scorer.score(QUERY, ["short", *long])
        scorer.score(QUERY, ["short"])
        scorer.score(QUERY, long[:2])
        if kind == "late-interaction":  # a query that many documents share
            scorer.score(long[0], ["short", "also short"])
    told = [(record.levelname, record.args[1]) for record in caplog.records if record.name.startswith("rag_rerank")]
    assert told == [("WARNING", 3), ("DEBUG", 2), *[("DEBUG", 1)] * (kind == "late-interaction")]


class TestRefused:
    """What can't be scored is refused with what it is and what to pass instead."""

    def test_a_folder_that_is_not_there(self, tmp_path: Path):
        """Nobody asks a hub for a path."""
        with pytest.raises(ConfigError, match="there is no folder.*org/name"):
            LocalScorer(tmp_path / "nothing").score("q", "d")

    def test_a_folder_that_is_no_model(self, tmp_path: Path):
        """It says which file is missing."""
        with pytest.raises(ConfigError, match="holds no model.*config.json"):
            LocalScorer(tmp_path).score("q", "d")

    def test_a_hub_model_that_cannot_be_had(self):
        """Offline and not cached: the cause is in the message."""
        with pytest.raises(ConfigError, match="'no-such-org/no-such-model' can't be loaded"):
            LocalScorer("no-such-org/no-such-model", local_files_only=True).score("q", "d")

    def test_a_classifier_with_several_labels(self, tmp_path: Path):
        """Which of three labels would be relevance?"""
        folder = make_bert_cross_encoder(tmp_path / "m", num_labels=3)
        with pytest.raises(ConfigError, match="3 labels"):
            LocalScorer(folder).score("q", "d")

    def test_a_model_that_only_generates(self, cross_encoder: Path, tmp_path: Path):
        """Its scores would be anybody's guess."""
        folder = edited(cross_encoder, tmp_path / "m", architectures=["Qwen3ForCausalLM"])
        with pytest.raises(ConfigError, match="Qwen3ForCausalLM"):
            LocalScorer(folder).score("q", "d")

    def test_weights_that_are_missing(self, local: LocalScorer, minilm: Path, tmp_path: Path):
        """An encoder posing as a cross-encoder would get a random head and random scores."""
        folder = edited(minilm, tmp_path / "m", architectures=["BertForSequenceClassification"], num_labels=1)
        with LocalScorer(folder, dtype="float32") as embeds:  # by its modules.json, which goes before config.json
            assert embeds.score("q", ["d", "q"]) == local.score("q", ["d", "q"])
        (folder / "modules.json").unlink()
        with pytest.raises(ConfigError, match=r"no weights for .*classifier"):
            LocalScorer(folder).score("q", "d")

    def test_pickled_weights(self, tmp_path: Path):
        """A pickle can run code; only safetensors are read."""
        folder = make_bert_cross_encoder(tmp_path / "m", safe=False)
        with pytest.raises(ConfigError, match="safetensors"):
            LocalScorer(folder).score("q", "d")

    def test_code_in_a_checkpoint(self, cross_encoder: Path, tmp_path: Path):
        """It runs only with trust_remote_code=True."""
        folder = edited(
            cross_encoder,
            tmp_path / "m",
            model_type="custom",
            auto_map={"AutoConfig": "canary.Config", "AutoModelForSequenceClassification": "canary.Model"},
        )
        (folder / "canary.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(ConfigError, match="trust_remote_code"):
            LocalScorer(folder).score("q", "d")
        assert not (tmp_path / "ran").exists()

    def test_a_bi_encoder_part_that_is_not_supported(self, minilm: Path, tmp_path: Path):
        """Leaving a layer out would give other embeddings."""
        shutil.copytree(minilm, tmp_path / "m")
        path = tmp_path / "m" / "modules.json"
        dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
        path.write_text(json.dumps([*json.loads(path.read_text())[:2], dense]))
        with pytest.raises(ConfigError, match="Dense"):
            LocalScorer(tmp_path / "m").score("q", "d")

    def test_an_input_longer_than_the_model_has_positions(self, cross_encoder: Path):
        """It would crash in the middle of a batch."""
        with pytest.raises(ConfigError, match=f"max_length=4096 .* {MAX_LENGTH} tokens"):
            LocalScorer(cross_encoder, max_length=4096).score("q", "d")

    @pytest.mark.parametrize("kind", ["cross-encoder", "bi-encoder", "decoder"])
    def test_a_limit_that_special_tokens_take_up(self, kind: str, cross_encoder: Path, minilm: Path, tmp_path: Path):
        """Tokenizers would cut nothing, and nothing of a document would be read."""
        folder = {"cross-encoder": cross_encoder, "bi-encoder": minilm}.get(kind)
        folder = folder or make_decoder_classifier(tmp_path / "m", "qwen3")
        options = {"template": "qwen3-reranker"} if kind == "decoder" else {}
        with pytest.raises(ConfigError, match=r"max_length is 2 .*no document would be read"):
            LocalScorer(folder, max_length=2, **options).score("q", "d")

    def test_a_query_that_leaves_a_document_no_room(self, cross_encoder: Path):
        """Where only documents are cut; it is that query's failure, and no other's."""
        with LocalScorer(cross_encoder, max_tokens_per_doc=10) as scorer:
            long, sound = scorer.rerank_batch(["word " * 200, "q"], [["a"], ["b"]], on_error="return")
        assert isinstance(long, BackendRejected)
        assert "set max_tokens_per_query" in str(long)
        assert isinstance(sound, list)

    def test_a_device_that_is_not_there(self, cross_encoder: Path):
        """With its name."""
        with pytest.raises(ConfigError, match="cuda:99"):
            LocalScorer(cross_encoder, device="cuda:99").score("q", "d")


class TestPooling:
    """The poolings of sentence-transformers, in both forms of their config."""

    @pytest.mark.parametrize(
        "config",
        [{"pooling_mode": mode} for mode in ("mean", "cls", "max", "lasttoken", ["mean", "max"])]
        + [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, {"pooling_mode_max_tokens": True}],
    )
    def test_each_is_that_of_sentence_transformers(self, config: dict[str, object], minilm: Path, tmp_path: Path):
        """To 1e-5."""
        from sentence_transformers import SentenceTransformer, util

        folder = tmp_path / "m"
        shutil.copytree(minilm, folder)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 384} | config))
        documents = ["a", "a somewhat longer document", "x y z"]
        reference = SentenceTransformer(str(folder), device="cpu")
        cosines = util.cos_sim(reference.encode(QUERY), reference.encode(documents))[0].tolist()
        with LocalScorer(folder, dtype="float32") as scorer:
            assert largest_difference(scorer.score(QUERY, documents), cosines) <= 1e-5

    def test_one_that_is_not_supported_is_named(self, minilm: Path, tmp_path: Path):
        """With the file and the field."""
        folder = tmp_path / "m"
        shutil.copytree(minilm, folder)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "median"}))
        with pytest.raises(ConfigError, match=r"1_Pooling/config\.json: pooling_mode is median"):
            LocalScorer(folder).score("q", "d")


class Owner:
    """What closes its scorer when it is collected, as a generator does that has one in a ``with``."""

    def __init__(self, scorer: LocalScorer) -> None:
        self.scorer, self.itself = scorer, self

    def __del__(self) -> None:
        self.scorer.close()


class TestCallers:
    """Threads, event loops, copies, deadlines."""

    def test_many_threads_get_their_own_scores(self, local_cross_encoder: LocalScorer, documents: list[str]):
        """Multimodal into common batches, told apart again."""
        expected = local_cross_encoder.score(QUERY, documents)
        with ThreadPoolExecutor(8) as pool:
            scores = list(pool.map(lambda text: local_cross_encoder.score(QUERY, [text])[0], documents))
        assert largest_difference(scores, expected) <= 1e-5

    async def test_async_calls_do_not_block_the_event_loop(self, local: LocalScorer, monkeypatch: pytest.MonkeyPatch):
        """It turns while the model is at work."""
        expected, go = local.score(QUERY, ["a", "b c"]), held(local, monkeypatch)
        call = asyncio.create_task(local.ascore(QUERY, ["a", "b c"]))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not call.done()
        go.set()
        assert largest_difference(await call, expected) <= 1e-5

    async def test_an_event_loop_only_waits(self, local_cross_encoder: LocalScorer, without_collections: None):
        """For 20,000 documents, in all of which nothing is done in its own thread."""
        documents, took = [f"document {number % 300}" for number in range(20_000)], []
        for _ in range(3):  # the least of three: a core that is shared makes the same work take longer
            began = time.thread_time()
            scores = await local_cross_encoder.ascore("document 7", documents)
            took.append(time.thread_time() - began)
            assert len(set(scores)) <= 300
        assert min(took) < 0.05

    async def test_closing_does_not_block_the_event_loop(self, cross_encoder: Path, monkeypatch: pytest.MonkeyPatch):
        """However long the batch takes that is running."""
        scorer, go, running = LocalScorer(cross_encoder), threading.Event(), threading.Event()
        await scorer.ascore("q", ["d"])
        model = scorer._engine.model.score_type
        run = type(model).run

        def slow(model: object, sequences: object) -> object:
            running.set()
            go.wait(10)
            return run(model, sequences)

        monkeypatch.setattr(type(model), "run", slow)
        call = asyncio.create_task(scorer.ascore("q", ["a"]))
        await asyncio.to_thread(running.wait, 10)
        closing = asyncio.create_task(scorer.aclose())
        await asyncio.sleep(0.01)
        assert not closing.done()
        go.set()
        await closing
        assert len(await call) == 1

    def test_one_event_loop_after_another(self, local_cross_encoder: LocalScorer):
        """The engine belongs to no loop."""
        first, second = (asyncio.run(local_cross_encoder.ascore("q", ["a"])) for _ in range(2))
        assert first == second

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_a_deadline_is_kept(self, local: LocalScorer, asynchronous: bool, monkeypatch: pytest.MonkeyPatch):
        """The caller gets on while the model is at work, and the engine is free for the next call."""
        go = held(local, monkeypatch)

        def call() -> list[float]:
            if asynchronous:
                return asyncio.run(local.ascore(QUERY, ["a"], deadline=0.2))
            return local.score(QUERY, ["a"], deadline=0.2)

        with pytest.raises(DeadlineExceeded, match="still scoring"):
            call()
        go.set()
        assert len(local.score(QUERY, ["a"])) == 1

    def test_an_unpickled_scorer_loads_its_own_model(self, cross_encoder: Path):
        """It outlives the original."""
        scorer = LocalScorer(cross_encoder, dtype="float32")
        expected = scorer.score("q", ["a", "b"])
        pickled = pickle.dumps(scorer)
        scorer.close()
        with pickle.loads(pickled) as copied:  # noqa: S301
            assert copied.score("q", ["a", "b"]) == expected

    def test_a_dropped_scorer_ends_its_thread(self, cross_encoder: Path):
        """Nobody has to close it."""
        scorer = LocalScorer(cross_encoder)
        scorer.score("q", "d")
        thread = scorer._engine.thread
        del scorer
        thread.join(10)
        assert not thread.is_alive()

    @pytest.mark.parametrize("closes", [False, True])
    def test_a_scorer_may_be_collected_by_one_of_its_own_threads(self, closes: bool, cross_encoder: Path, monkeypatch):
        """The garbage collector runs in any thread: nothing is waited for there, not even by what closes it."""
        scorer = LocalScorer(cross_encoder)
        scorer.score("q", "d")
        model, thread, dropped = scorer._engine.model.score_type, scorer._engine.thread, threading.Event()
        run = type(model).run

        def run_and_collect(model: object, sequences: object) -> object:
            dropped.wait(10)
            gc.collect()
            return run(model, sequences)

        monkeypatch.setattr(type(model), "run", run_and_collect)
        future = scorer._engine.submit(["q"], ["a", "b"])
        scorer.itself = Owner(scorer) if closes else scorer
        del scorer, model
        dropped.set()
        thread.join(10)
        assert not thread.is_alive()
        assert future.done()

    def test_warming_up_loads_the_model(self, cross_encoder: Path, tmp_path: Path):
        """And reports what is wrong with it before the first query does."""
        with LocalScorer(cross_encoder) as scorer:
            scorer.warmup()
        with pytest.raises(ConfigError):
            LocalScorer(tmp_path).warmup()
