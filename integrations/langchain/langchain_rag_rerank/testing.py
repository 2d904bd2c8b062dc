"""Standard tests for rerankers, in the manner of the ``langchain-tests`` package, which has none for them.

Needs pytest, and is not imported by the package itself. All of it follows from what `BaseDocumentCompressor` promises
and from what retrievers and chains do with one, so that any integration may adopt it:

    class TestMyReranker(RerankerUnitTests):
        @property
        def reranker_class(self):
            return MyReranker

        @property
        def reranker_params(self):
            return {"model": "small"}
"""

# ruff: noqa: S101 - pytest's asserts
import asyncio
import copy
import inspect
import json
import math
import os
import threading
from abc import abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
from langchain_core.callbacks import CallbackManager, Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.load import dumps
from pydantic import SecretStr


class Passage(Document):
    """A document with a field of its own."""

    page: int = 0


class RerankerUnitTests:
    """Tests of the contract of a reranker; override the properties.

    A reranker may keep fewer documents than it gets, but must not invent, join or cut any.
    """

    @property
    @abstractmethod
    def reranker_class(self) -> type[BaseDocumentCompressor]:
        """The class to be tested."""

    @property
    def reranker_params(self) -> dict[str, Any]:
        """What it is made with."""
        return {}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        """Environment variables, further arguments, and the attributes that they must lead to; empty: not tested."""
        return {}, {}, {}

    @property
    def secret_params(self) -> dict[str, str]:
        """Arguments that nobody may be shown, with values that would be recognised; empty: not tested."""
        return {}

    @property
    def score_key(self) -> str:
        """Under which name the score stands in a document's metadata."""
        return "relevance_score"

    @property
    def top_n_arg_name(self) -> str:
        """The argument for how many documents are kept."""
        return "top_n"

    @property
    def query(self) -> str:
        """A query, for which the reranker must not find all of `texts` equally good."""
        return "how do bears sleep in winter"

    @property
    def texts(self) -> list[str]:
        """At least four texts, two of them equal."""
        return [
            "a recipe for bread",
            "bears sleep in winter",
            "how to sleep well",
            "bears sleep in winter",
            "bears eat fish",
        ]

    @pytest.fixture
    def reranker(self) -> BaseDocumentCompressor:
        """One that keeps all documents."""
        return self.make(**{self.top_n_arg_name: len(self.texts)})

    def make(self, **params: Any) -> BaseDocumentCompressor:
        """Make a reranker with these arguments beside its usual ones."""
        return self.reranker_class(**{**self.reranker_params, **params})

    def documents(self) -> list[Document]:
        """Make documents of the texts, with ids and metadata, in a class of their own."""
        return [Passage(page_content=text, id=f"d{n}", page=n, metadata={"n": n}) for n, text in enumerate(self.texts)]

    def test_init(self) -> None:
        """It can be made, and tells nothing that it should not by that."""
        assert isinstance(self.make(), BaseDocumentCompressor)

    def test_init_from_env(self) -> None:
        """What it reads from the environment arrives in its attributes."""
        variables, params, expected = self.init_from_env_params
        if not variables:
            pytest.skip("init_from_env_params is empty")
        with mock.patch.dict(os.environ, variables):
            reranker = self.make(**params)
        for name, value in expected.items():
            actual = getattr(reranker, name)
            assert (actual.get_secret_value() if isinstance(actual, SecretStr) else actual) == value

    def test_unknown_arguments_are_refused(self) -> None:
        """A mistyped name must not be ignored, and no error may repeat its value."""
        with pytest.raises((TypeError, ValueError)) as caught:
            self.make(no_such_argument="canary-value")
        assert "canary-value" not in str(caught.value)

    def test_secrets_are_not_shown(self) -> None:
        """Neither by a repr nor by LangChain's dumps."""
        if not self.secret_params:
            pytest.skip("secret_params is empty")
        reranker = self.make(**self.secret_params)
        for shown in (repr(reranker), str(reranker), reranker.model_dump_json(), dumps(reranker)):
            assert not [name for name, value in self.secret_params.items() if value in shown]

    def test_signatures_are_those_of_the_base_class(self) -> None:
        """Pipelines look for a parameter named ``callbacks``, and pass it by its name."""
        for name in ("compress_documents", "acompress_documents"):
            ours, theirs = (inspect.signature(getattr(c, name)) for c in (self.reranker_class, BaseDocumentCompressor))
            assert list(ours.parameters) == list(theirs.parameters)
            assert ours.parameters["callbacks"].default is None

    def test_documents_come_back_best_first(self, reranker: BaseDocumentCompressor) -> None:
        """Each once, the equal ones too, with a finite float as score, which can be written as JSON."""
        results = reranker.compress_documents(self.documents(), self.query)
        assert isinstance(results, list)
        assert sorted(result.metadata["n"] for result in results) == list(range(len(self.texts)))
        scores = [result.metadata[self.score_key] for result in results]
        assert {type(score) for score in scores} == {float}
        assert all(map(math.isfinite, scores))
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) > 1, "a reranker that finds all texts equally good shows nothing here"
        json.dumps([result.metadata for result in results])

    def test_equal_texts_stay_in_retrieval_order(self, reranker: BaseDocumentCompressor) -> None:
        """Where scores are equal, the search's order stands."""
        documents = [Document(page_content=self.texts[0], metadata={"n": n}) for n in range(4)]
        results = reranker.compress_documents(documents, self.query)
        places = [(-result.metadata[self.score_key], result.metadata["n"]) for result in results]
        assert places == sorted(places)

    def test_ids_classes_and_metadata_survive(self, reranker: BaseDocumentCompressor) -> None:
        """What comes back are the documents that were given, with a score; a lock in the metadata is no obstacle."""
        lock = threading.Lock()
        documents = self.documents()
        for document in documents:
            document.metadata["lock"] = lock
        for result in reranker.compress_documents(documents, self.query):
            original = documents[result.metadata["n"]]
            assert isinstance(result, Passage)
            assert (result.id, result.page, result.page_content) == (original.id, original.page, original.page_content)
            assert result.metadata["lock"] is lock

    def test_documents_given_are_not_changed(self, reranker: BaseDocumentCompressor) -> None:
        """Results of two calls with the same list do not meet."""
        documents = self.documents()
        before = copy.deepcopy(documents)
        first = reranker.compress_documents(documents, self.query)
        kept = copy.deepcopy(first)
        reranker.compress_documents(documents, self.texts[0])
        assert documents == before
        assert first == kept

    def test_an_earlier_score_is_replaced(self, reranker: BaseDocumentCompressor) -> None:
        """A score that a document brings along must not be taken for the new one."""
        [result] = reranker.compress_documents(
            [Document(page_content=self.texts[0], metadata={self.score_key: 99.0})], self.query
        )
        [fresh] = reranker.compress_documents([Document(page_content=self.texts[0])], self.query)
        assert result.metadata[self.score_key] == pytest.approx(fresh.metadata[self.score_key], abs=1e-6)

    def test_top_n(self) -> None:
        """The best are kept; more than there are is no error."""
        everything = self.make(**{self.top_n_arg_name: 99}).compress_documents(self.documents(), self.query)
        assert len(everything) == len(self.texts)
        for count in (1, 3):
            results = self.make(**{self.top_n_arg_name: count}).compress_documents(self.documents(), self.query)
            assert self.order(results) == self.order(everything)[:count]

    def test_any_sequence_will_do(self, reranker: BaseDocumentCompressor) -> None:
        """A tuple is as good as a list."""
        results = reranker.compress_documents(tuple(self.documents()), self.query)
        assert len(results) == len(self.texts)

    def test_no_documents(self, reranker: BaseDocumentCompressor) -> None:
        """Nothing in, nothing out: pipelines call later stages with what an earlier one left."""
        assert list(reranker.compress_documents([], self.query)) == []
        assert list(asyncio.run(reranker.acompress_documents([], self.query))) == []

    def test_empty_texts_are_scored(self, reranker: BaseDocumentCompressor) -> None:
        """An empty document is not dropped, and an empty query is no error."""
        documents = [Document(page_content=""), Document(page_content=self.texts[0])]
        assert len(reranker.compress_documents(documents, self.query)) == 2
        assert len(reranker.compress_documents(documents, "")) == 2

    def test_a_query_must_be_text(self, reranker: BaseDocumentCompressor) -> None:
        """A query that got lost on the way is an error that can be understood."""
        with pytest.raises((TypeError, ValueError), match="query"):
            reranker.compress_documents(self.documents(), None)  # type: ignore[arg-type]

    def test_callbacks_may_be_handlers_or_a_manager(self, reranker: BaseDocumentCompressor) -> None:
        """Retrievers pass a manager, users a list."""
        several: tuple[Callbacks, ...] = (None, [], CallbackManager(handlers=[]))
        for callbacks in several:
            results = reranker.compress_documents(self.documents(), self.query, callbacks=callbacks)
            assert len(results) == len(self.texts)

    def test_async_gives_the_same(self, reranker: BaseDocumentCompressor) -> None:
        """In two event loops, one after the other: scripts and notebooks call `asyncio.run` again and again."""
        expected = self.order(reranker.compress_documents(self.documents(), self.query))
        for _ in range(2):
            results = asyncio.run(reranker.acompress_documents(self.documents(), self.query))
            assert self.order(results) == expected

    def test_sync_calls_work_inside_a_running_loop(self, reranker: BaseDocumentCompressor) -> None:
        """As in a notebook's cell."""

        async def ask() -> list[str]:
            return self.order(reranker.compress_documents(self.documents(), self.query))

        assert asyncio.run(ask()) == self.order(reranker.compress_documents(self.documents(), self.query))

    def test_threads_may_share_it(self, reranker: BaseDocumentCompressor) -> None:
        """A retriever's ``batch`` calls it from several at once."""
        expected = self.order(reranker.compress_documents(self.documents(), self.query))
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(reranker.compress_documents, self.documents(), self.query) for _ in range(8)]
        assert all(self.order(call.result()) == expected for call in calls)

    def test_copies_rank_alike(self, reranker: BaseDocumentCompressor) -> None:
        """Shallow and deep; chains copy what they are made of."""
        expected = self.order(reranker.compress_documents(self.documents(), self.query))
        for twin in (copy.copy(reranker), copy.deepcopy(reranker), reranker.model_copy()):
            assert self.order(twin.compress_documents(self.documents(), self.query)) == expected

    @staticmethod
    def order(documents: Iterable[Document]) -> list[str]:
        """Give the texts in order. Not the documents: servers may score equal texts a rounding error apart."""
        return [document.page_content for document in documents]
