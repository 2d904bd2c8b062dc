"""Settings: which there are, what is said about wrong ones, and where they go: into dicts, pickles and copies."""

import copy
import inspect
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import MetadataMode
from pydantic import PrivateAttr, ValidationError

from llama_index.postprocessor.rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from rag_rerank import BackendUnavailable, ConfigError, LocalScorer, RerankError, Scorer, VLLMScorer
from tests.integrations.llamaindex.support import (
    NOBODY,
    QUERY,
    SECRET,
    CallbackLog,
    EventLog,
    KeywordScorer,
    found,
)

RERANKERS = [
    VLLMReranker(base_url=NOBODY, model="m", api_key=SECRET, top_n=None, score_threshold=0.5, timeout=3),
    VLLMReranker(
        base_url=[NOBODY, "https://b/v1"], keep_retrieval_score=True, on_empty_text="drop", extra_body={"a": 1}
    ),
    LocalReranker(model=Path("folder"), dtype="float32", metadata_mode=MetadataMode.NONE, on_error="passthrough"),
    LocalReranker(
        cache_dir=Path("cache"), model_kwargs={"a": [1]}, classifier_tokens=["no", "yes"], metadata_mode="all"
    ),
]
by_name = pytest.mark.parametrize("reranker", RERANKERS, ids=lambda reranker: reranker.class_name())


class TestFields:
    """Which there are, and how they are checked."""

    @pytest.mark.parametrize(("kind", "backend"), [(LocalReranker, LocalScorer), (VLLMReranker, VLLMScorer)])
    def test_fields_are_the_scorers_arguments(self, kind: type, backend: type[Scorer]) -> None:
        """Each argument of the scorer is a field with the same default. One more says what a score means."""
        arguments = {name: argument.default for name, argument in inspect.signature(backend).parameters.items()}
        fields = kind.model_fields.keys() - ScorerReranker.model_fields.keys()
        assert fields == arguments.keys() | {"calibration"}
        for name, default in arguments.items():
            assert kind.model_fields[name].get_default(call_default_factory=True) == default

    @pytest.mark.parametrize(
        ("kind", "backend"), [(ScorerReranker, None), (LocalReranker, LocalScorer), (VLLMReranker, VLLMScorer)]
    )
    def test_every_field_is_described(self, kind: type, backend: type[Scorer] | None) -> None:
        """In the docstring of the class, or in that of ScorerReranker or of the scorer, both of which it names."""
        places = [kind] if backend is None else [kind, ScorerReranker, backend]
        assert all(f"`{place.__name__}`" in kind.__doc__.replace("`rag_rerank.", "`") for place in places[1:])
        for name in kind.model_fields:
            assert any(re.search(rf"^ {{8}}(\w+, )*{name}[:,]", place.__doc__, re.MULTILINE) for place in places), name
        assert inspect.signature(kind).parameters.keys() == kind.model_fields.keys()

    @pytest.mark.parametrize(
        ("kind", "wrong"),
        [
            (VLLMReranker, {"base_url": "localhost:8000"}),
            (VLLMReranker, {"timeout": 0}),
            (LocalReranker, {"dtype": "float8"}),
            (LocalReranker, {"model": ""}),
        ],
    )
    def test_wrong_settings_are_reported_at_once(self, kind: type, wrong: dict[str, object]) -> None:
        """A setting that the scorer refuses is its ConfigError at construction, not pydantic's error."""
        with pytest.raises(ConfigError):
            kind(**wrong)

    @pytest.mark.parametrize(
        ("kind", "wrong", "meant"),
        [
            (VLLMReranker, "topn", "top_n"),
            (VLLMReranker, "top_k", "top_n"),
            (VLLMReranker, "cohere_api_key", "api_key"),
            (VLLMReranker, "keep_retrieval_scores", "keep_retrieval_score"),
            (LocalReranker, "model_name", "model"),
            (LocalReranker, "cache_folder", "cache_dir"),
            (LocalReranker, "use_fp16", "dtype"),
            (LocalReranker, "base_url", None),
        ],
    )
    def test_a_wrong_name_is_answered_with_the_likely_one(self, kind: type, wrong: str, meant: str | None) -> None:
        """And never with its value, which may be a key."""
        for make in (kind, lambda **fields: kind.from_dict(fields), lambda **fields: kind.model_validate(fields)):
            with pytest.raises(ValidationError) as caught:
                make(**{wrong: SECRET})
            message = f"{kind.__name__} has no such field" + (f"; did you mean {meant}?" if meant else "")
            assert f"{wrong}\n  {message} " in str(caught.value)
            assert [error["msg"] for error in caught.value.errors()] == [message]
            assert SECRET not in str(caught.value) + repr(caught.value) + repr(caught.value.errors())

    def test_all_wrong_names_are_named(self) -> None:
        """In the order in which they were given."""
        with pytest.raises(ValidationError) as caught:
            VLLMReranker(topn=3, url="http://x", api_key=SECRET)
        assert [error["loc"] for error in caught.value.errors()] == [("topn",), ("url",)]

    def test_wrong_values_are_not_shown(self) -> None:
        """Nor is a name that is assigned to by mistake let through."""
        with pytest.raises(ValidationError) as caught:
            VLLMReranker(api_key=[SECRET])
        assert SECRET not in str(caught.value)
        reranker = VLLMReranker()
        for name in ("api_key", "topn"):
            with pytest.raises(ValidationError) as caught:
                setattr(reranker, name, [SECRET])
            assert SECRET not in str(caught.value)

    def test_only_scorers_are_accepted(self) -> None:
        """Something else in the place of a scorer is refused at construction."""
        with pytest.raises(ValidationError):
            ScorerReranker(scorer="cross-encoder/ms-marco-MiniLM-L6-v2")

    @pytest.mark.parametrize("kind", [ScorerReranker, LocalReranker, VLLMReranker])
    def test_schemas_list_the_fields(self, kind: type[ScorerReranker]) -> None:
        """The JSON schema, which forms and tools are made from, has the fields and the class's name."""
        properties = kind.model_json_schema()["properties"]
        common = {"top_n", "score_threshold", "metadata_mode", "keep_retrieval_score", "on_empty_text", "on_error"}
        assert common | {"class_name"} <= properties.keys()

    def test_a_changed_field_counts_from_the_next_call(self) -> None:
        """The scorer always fits the fields, whichever way they were changed, and is kept while they stay."""
        reranker = VLLMReranker(base_url=NOBODY, model="a")
        first = reranker.scorer
        reranker.top_n = 1
        assert reranker.scorer is first
        reranker.model = "b"
        assert reranker.scorer.model_name == "b"
        assert reranker.model_copy(update={"model": "c"}).scorer.model_name == "c"
        assert reranker.scorer.model_name == "b"
        options = LocalReranker(model_kwargs={})
        before = options.scorer
        options.model_kwargs["attn_implementation"] = "eager"
        assert options.scorer is not before


class Tenant(VLLMReranker):
    """Has an argument that is no field."""

    _tenant: str = PrivateAttr(default="")

    def __init__(self, tenant: str, **fields: Any) -> None:
        super().__init__(instruction=f"for {tenant}", **fields)
        self._tenant = tenant


class TestCopies:
    """Dicts, pickles, copies, and what of a reranker they have."""

    @by_name
    def test_settings_survive_dict_and_json(self, reranker: VLLMReranker | LocalReranker) -> None:
        """`from_dict` and `from_json` give back what `to_dict` and `to_json` were given, but for the key."""
        kind = type(reranker)
        assert kind.from_dict(reranker.to_dict()).to_dict() == reranker.to_dict()
        assert kind.from_json(reranker.to_json()).to_dict() == reranker.to_dict()
        assert reranker.to_dict()["class_name"] == kind.__name__

    @by_name
    def test_what_comes_back_is_equal(self, reranker: VLLMReranker | LocalReranker) -> None:
        """With the key passed again; equal are rerankers of one class with the same fields."""
        kind, key = type(reranker), {"api_key": SECRET} if getattr(reranker, "api_key", None) else {}
        assert kind.from_dict(reranker.to_dict(), **key) == reranker
        assert kind.from_json(reranker.to_json(), **key) == reranker == copy.deepcopy(reranker)
        assert reranker != reranker.model_copy(update={"top_n": 7})
        assert reranker != "a reranker"

    @by_name
    def test_rerankers_can_be_pickled_and_copied(self, reranker: VLLMReranker | LocalReranker, caplog) -> None:
        """A pickle and any copy have the same settings, and LlamaIndex warns of nothing that it had to remove."""
        twins = [pickle.loads(pickle.dumps(reranker)), copy.deepcopy(reranker), reranker.model_copy(deep=True)]  # noqa: S301 - our own
        for twin in [*twins, copy.copy(reranker), reranker.model_copy()]:
            assert twin.to_dict() == reranker.to_dict()
            assert twin.scorer.model_name == reranker.scorer.model_name
        assert caplog.records == []

    def test_a_class_of_ones_own_is_made_once(self) -> None:
        """What unpickles it neither asks for its own arguments nor loses what it holds."""
        twin = pickle.loads(pickle.dumps(Tenant("a", top_n=2)))  # noqa: S301 - our own
        assert (type(twin), twin.instruction, twin.top_n, twin._tenant) == (Tenant, "for a", 2, "a")

    def test_copies_share_the_scorer(self, local: LocalScorer) -> None:
        """No copy loads a model of its own."""
        for reranker in (LocalReranker(), VLLMReranker(api_key=SECRET), ScorerReranker(scorer=local)):
            assert copy.copy(reranker).scorer is reranker.scorer
            assert copy.deepcopy(reranker).scorer is reranker.scorer

    def test_equal_settings_share_the_scorer(self) -> None:
        """However they came about, and whatever is made of the scores; a key is a setting, too."""
        local, served = LocalReranker(max_length=64), VLLMReranker(base_url=NOBODY, api_key=SECRET)
        pickled = pickle.loads(pickle.dumps(local))  # noqa: S301 - our own
        equals = [pickled, LocalReranker.from_dict(local.to_dict()), LocalReranker(max_length=64, top_n=1)]
        assert {equal.scorer for equal in equals} == {local.scorer}
        assert VLLMReranker.from_dict(served.to_dict(), api_key=SECRET, top_n=1).scorer is served.scorer
        assert VLLMReranker.from_dict(served.to_dict()).scorer is not served.scorer
        assert LocalReranker(max_length=65).scorer is not local.scorer
        local.max_length = 65
        assert local.scorer is not equals[0].scorer

    def test_closing_one_leaves_the_others(self, cross_encoder: Path) -> None:
        """The model is given up with the last of them."""
        first, second = (LocalReranker(model=cross_encoder, top_n=n) for n in (1, 2))
        first.close()
        assert len(second.postprocess_nodes(found(), query_str=QUERY)) == 2
        with pytest.raises(RerankError, match="This LocalReranker is closed"):
            first.postprocess_nodes(found(), query_str=QUERY)
        scorer = second.scorer
        second.close()
        with pytest.raises(RerankError, match="closed"):
            scorer.score(QUERY, "text")

    def test_a_copy_with_changes_leaves_the_original_alone(self, scorer: KeywordScorer) -> None:
        """One reranker for each use, one scorer for all."""
        first = ScorerReranker(scorer=scorer)
        second = first.model_copy(update={"top_n": 1})
        assert (len(first.postprocess_nodes(found(), query_str=QUERY)), scorer.calls) == (5, 1)
        assert (len(second.postprocess_nodes(found(), query_str=QUERY)), scorer.calls) == (1, 2)

    def test_pickling_leaves_the_reranker_as_it_is(self) -> None:
        """What can't be pickled, such as an engine's callbacks, stays where it is."""
        log = CallbackLog()
        log.unpicklable = lambda: None
        reranker = VLLMReranker(callback_manager=CallbackManager([log]))
        pickle.dumps(reranker)
        assert reranker.callback_manager.handlers == [log]

    def test_a_deep_copy_reports_to_the_same_callbacks(self, caplog: pytest.LogCaptureFixture) -> None:
        """They may hold locks and connections, which can't be copied."""
        log = CallbackLog()
        log.lock = threading.Lock()
        reranker = VLLMReranker(callback_manager=CallbackManager([log]))
        for twin in (copy.deepcopy(reranker), copy.deepcopy([reranker, reranker])[1]):
            assert twin is not reranker
            assert twin.callback_manager is reranker.callback_manager
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []

    def test_the_key_is_shown_nowhere(self, events: EventLog) -> None:
        """It is in no repr, dict, JSON, pickle or event; deep copies have it, for they stay in the process."""
        reranker = VLLMReranker(base_url=NOBODY, api_key=SECRET, max_retries=0)
        with pytest.raises(BackendUnavailable) as caught:
            reranker.postprocess_nodes(found(), query_str=QUERY)
        shown = [repr(reranker), str(reranker.to_dict()), reranker.to_json(), repr(caught.value), repr(events.events)]
        assert all(SECRET not in text for text in shown)
        assert SECRET.encode() not in pickle.dumps(reranker)
        assert copy.deepcopy(reranker).api_key.get_secret_value() == SECRET

    def test_a_given_scorer_is_given_again(self, scorer: KeywordScorer) -> None:
        """A ScorerReranker's dict leaves the scorer out; `from_dict` takes it as an argument."""
        data = ScorerReranker(scorer=scorer, top_n=2).to_dict()
        assert "scorer" not in data
        again = ScorerReranker.from_dict(data, scorer=scorer)
        assert (again.scorer, again.top_n) == (scorer, 2)
        with pytest.raises(ValidationError):
            ScorerReranker.from_dict(data)


def test_importing_and_constructing_load_no_model_library() -> None:
    """The import brings neither torch nor httpx, beyond what LlamaIndex brings by itself, nor a constructor torch."""
    script = """
import sys
import llama_index.core.callbacks, llama_index.core.postprocessor.types  # with core 0.13, they bring httpx
before = set(sys.modules)
from llama_index.postprocessor.rag_rerank import LocalReranker, VLLMReranker
assert not {"torch", "transformers", "httpx", "rag_rerank.vllm"} & (sys.modules.keys() - before)
LocalReranker()
assert not {"torch", "transformers", "httpx", "rag_rerank.vllm"} & (sys.modules.keys() - before)
VLLMReranker()
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
