"""Secrets, dumps, pickles and copies."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
from langchain_core.load import dumpd, dumps, loads
from langchain_core.runnables import RunnablePassthrough, RunnableSequence
from pydantic import PrivateAttr, SecretStr, ValidationError

from langchain_rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from rag_rerank import BackendUnavailable, ConfigError
from tests.integrations.langchain.common import QUERY, BrokenScorer, compressing, found, keywords, numbers

KEY = "sk-do-not-tell"

# As langchain_rag_rerank 0.1.0 wrote them before its settings moved to rag_rerank.
OLD_DUMPS = {
    VLLMReranker: (
        '{"lc": 1, "type": "constructor", "id": ["langchain_rag_rerank", "VLLMReranker"], "kwargs": {"top_n": null, '
        '"score_threshold": 0.0, "score_key": "relevance_score", "on_error": "raise", "base_url": '
        '"http://localhost:8000/v1", "model": "m", "api_key": {"lc": 1, "type": "secret", "id": ["VLLM_API_KEY"]}, '
        '"truncate_prompt_tokens": null, "extra_body": {"a": 1}, "endpoint": "score", "timeout": 30.0, "max_retries": '
        '2, "chunk_size": 128, "max_concurrency": 4, "connect_timeout": 2.0}, "name": "VLLMReranker"}'
    ),
    LocalReranker: (
        '{"lc": 1, "type": "constructor", "id": ["langchain_rag_rerank", "LocalReranker"], "kwargs": {"top_n": 7, '
        '"score_key": "relevance_score", "on_error": "raise", "model": "m", "dtype": "float32", "score_type": "auto", '
        '"template": "auto", "instruction": "i", "classifier_tokens": ["no", "yes"], "use_activation": false, '
        '"long_documents": "truncate", "max_waiting_calls": 1024, "model_kwargs": {"a": 1}}, "name": "LocalReranker"}'
    ),
}
SETTINGS: dict[type, dict[str, Any]] = {
    VLLMReranker: {
        "api_key": KEY,
        "base_url": "http://localhost:8000/v1",
        "model": "m",
        "top_n": None,
        "score_threshold": 0.0,
        "truncate_prompt_tokens": None,
        "extra_body": {"a": 1},
    },
    LocalReranker: {
        "model": "m",
        "dtype": "float32",
        "top_n": 7,
        "instruction": "i",
        "classifier_tokens": ("no", "yes"),
        "use_activation": False,
        "model_kwargs": {"a": 1},
    },
}
both = pytest.mark.parametrize("cls", [VLLMReranker, LocalReranker])


def read(dump: str, **options: Any) -> Any:
    """What langchain_core.load makes of it, told that these classes may be made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is in beta
        return loads(
            dump,
            allowed_objects=[VLLMReranker, LocalReranker, RunnableSequence, RunnablePassthrough],
            valid_namespaces=["langchain_rag_rerank"],
            secrets_map={"VLLM_API_KEY": KEY},
            **options,
        )


class TestSecrets:
    """Keys."""

    def test_the_key_is_told_to_nobody_but_the_server(self):
        """No repr, dump, pickle or error has it, of the reranker, its scorer or a retriever around it."""
        reranker = VLLMReranker(api_key=KEY, base_url="http://127.0.0.1:1", max_retries=0)
        retriever = compressing(reranker)
        with pytest.raises(BackendUnavailable) as unreachable:
            reranker.compress_documents(found(), QUERY)
        with pytest.raises(ValidationError) as refused:
            VLLMReranker(api_key=KEY, secret_key=KEY)
        with pytest.raises(ConfigError) as malformed:
            VLLMReranker(api_key=KEY + "\n")
        things = (reranker, reranker.scorer, retriever, reranker.as_retriever(retriever), reranker.as_cross_encoder())
        told = [
            *(show(thing) for show in (repr, str, dumps, dumpd) for thing in things),
            reranker.model_dump(),
            reranker.model_dump_json(),
            pickle.dumps(reranker),
            pickle.dumps(reranker.scorer),
            *(error.value for error in (unreachable, refused, malformed)),
        ]
        assert not [shown for shown in map(str, told) if KEY in shown]
        with pytest.raises(ConfigError, match="HF_TOKEN"):
            LocalReranker(model_kwargs={"token": KEY})

    def test_an_address_with_a_password_is_refused(self):
        """And repeated nowhere."""
        for base_url in (f"http://user:{KEY}@localhost:8000", ["http://localhost", f"http://user:{KEY}@localhost"]):
            with pytest.raises(ConfigError) as caught:
                VLLMReranker(base_url=base_url)
            assert KEY not in str(caught.value)

    def test_the_key_comes_from_its_own_variable_only(self, monkeypatch: pytest.MonkeyPatch):
        """Never from that of another service."""
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        assert not VLLMReranker().scorer.client.transport.keys
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        assert VLLMReranker().scorer.client.transport.keys


class TestDumps:
    """LangChain's own format."""

    def test_a_dump_reads_back(self):
        """langchain_core.load gives back an equal reranker, the key taken from the secrets of the reader."""
        reranker = VLLMReranker(api_key=KEY, model="m", top_n=None, score_threshold=0.0, truncate_prompt_tokens=None)
        assert reranker.is_lc_serializable()
        assert dumpd(reranker)["id"] == ["langchain_rag_rerank", "VLLMReranker"]
        again = read(dumps(reranker))
        assert again == reranker
        assert again.api_key == SecretStr(KEY)

    @both
    def test_an_old_dump_reads_back(self, cls: type):
        """What was written by an earlier version, and what this one writes of the same, are the same reranker."""
        assert read(OLD_DUMPS[cls]) == cls(**SETTINGS[cls]) == read(dumps(cls(**SETTINGS[cls])))

    def test_several_addresses_read_back(self):
        """As a list."""
        reranker = VLLMReranker(api_key=KEY, base_url=["http://localhost:8000", "http://localhost:8001"])
        assert read(dumps(reranker)) == reranker

    def test_a_chain_reads_back(self):
        """The reranker inside of it is found."""
        chain = RunnablePassthrough() | VLLMReranker(api_key=KEY, model="m", top_n=1)
        again = read(dumps(chain))
        assert again.steps[-1] == chain.steps[-1]

    def test_a_formatter_is_left_out(self):
        """Functions can't be written."""
        reranker = LocalReranker(model="m", document_formatter=str)
        assert read(dumps(reranker)) == LocalReranker(model="m")

    def test_a_scorer_is_not_dumped(self):
        """What holds a live object is marked as not implemented instead of being dumped without it."""
        assert dumpd(keywords())["type"] == "not_implemented"


class Counting(LocalReranker):
    _calls: list[int] = PrivateAttr(default_factory=list)


class CountingRemotely(VLLMReranker):
    _calls: list[int] = PrivateAttr(default_factory=list)


class TestCopies:
    """In this process they share the model."""

    def test_copies_share_the_loaded_model(self, in_process):
        """A copy, deep or not, ranks as the original does and loads no second model."""
        assert_copies_rank_alike(in_process)

    def test_a_pickled_reranker_stands_for_itself(self, in_process):
        """It shares the model where settings make it, a scorer is pickled; closing it leaves the original open."""
        expected = numbers(in_process.compress_documents(found(), QUERY))
        with pickle.loads(pickle.dumps(in_process)) as reranker:  # noqa: S301
            assert numbers(reranker.compress_documents(found(), QUERY)) == expected
            is_given = isinstance(in_process, ScorerReranker)
            assert (reranker.scorer is in_process.scorer) == (not is_given)
            if is_given:
                reranker.scorer.close()
        assert numbers(in_process.compress_documents(found(), QUERY)) == expected

    def test_a_pickled_retriever_works(self, cross_encoder: Path):
        """With what it is made of."""
        with LocalReranker(model=cross_encoder, dtype="float32", top_n=None) as reranker:
            retriever = reranker.as_retriever(compressing(reranker).base_retriever)
            expected = numbers(retriever.invoke(QUERY))
            again = pickle.loads(pickle.dumps(retriever))  # noqa: S301
            assert numbers(again.invoke(QUERY)) == expected
            assert numbers(copy.deepcopy(retriever).invoke(QUERY)) == expected
            again.reranker.close()

    def test_the_key_is_in_copies_but_not_in_pickles(self, monkeypatch: pytest.MonkeyPatch):
        """Another process reads its own environment."""
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        reranker = VLLMReranker(api_key=KEY)
        assert copy.deepcopy(reranker).api_key == reranker.model_copy().api_key == SecretStr(KEY)
        assert pickle.loads(pickle.dumps(reranker)).api_key is None  # noqa: S301

    @pytest.mark.parametrize("cls", [Counting, CountingRemotely])
    def test_a_class_of_ones_own_keeps_what_it_holds(self, cls: type):
        """Another process finds the private attributes that it has beside ours."""
        reranker = cls(model="m")
        reranker._calls.append(1)
        assert pickle.loads(pickle.dumps(reranker))._calls == [1]  # noqa: S301

    def test_equal_settings_are_equal_rerankers(self):
        """Whether or not they have been used; another class never is."""
        used = VLLMReranker(top_n=1)
        assert used.scorer
        assert used == VLLMReranker(top_n=1) != VLLMReranker(top_n=2)
        assert LocalReranker() != VLLMReranker()
        assert keywords() != keywords(), "each has a scorer of its own"
        scorer = BrokenScorer()
        assert keywords().model_copy(update={"scorer": scorer}) == keywords().model_copy(update={"scorer": scorer})


def assert_copies_rank_alike(reranker: Any) -> None:
    expected = numbers(reranker.compress_documents(found(), QUERY))
    copies = [copy.copy(reranker), copy.deepcopy(reranker), reranker.model_copy(), reranker.model_copy(deep=True)]
    assert {id(each.scorer) for each in copies} == {id(reranker.scorer)}
    assert all(numbers(each.compress_documents(found(), QUERY)) == expected for each in copies)
