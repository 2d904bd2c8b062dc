"""The LangChain rerankers: what a retriever, a chain, a trace and a dump see of them."""

import asyncio
import copy
import inspect
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from operator import itemgetter
from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.load import dumpd, dumps, loads
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from pydantic import SecretStr, ValidationError

import langchain_rag_rerank
import rag_rerank
from langchain_rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from rag_rerank import AuthError, BackendUnavailable, ConfigError, LocalScorer, RerankError, Scorer, VLLMScorer

QUERY = "how do bears sleep in winter"
TEXTS = [
    "a recipe for bread",
    "bears sleep in winter",
    "how to sleep well",
    "bears sleep in winter",
    "bears eat fish",
]
BEST_FIRST = [1, 3, 2, 4, 0]  # by words shared with QUERY: 4, 4, 2, 1, 0
KEY = "sk-do-not-tell"


class KeywordScorer(Scorer):
    """Counts the words that query and document share."""

    model_name = "keywords"

    def __init__(self):
        self.calls = 0

    def _score(self, queries, documents, until):
        self.calls += 1
        words = set(queries[0].split())
        return [float(len(words & set(document.split()))) for document in documents]


class NativeScorer(KeywordScorer):
    """A scorer whose async way is its own; the sync one must not be used behind its back."""

    async def _ascore(self, queries, documents, until):
        await asyncio.sleep(0)
        return super()._score(queries, documents, until)

    def _score(self, queries, documents, until):
        raise AssertionError("scored in a thread")


class BrokenScorer(KeywordScorer):
    """A server that is down."""

    model_name = "broken"

    def _score(self, queries, documents, until):
        raise BackendUnavailable("nobody answers", endpoint="localhost:1")


class Passage(Document):
    """A Document subclass with a field of its own."""

    page: int = 0


class Finds(BaseRetriever):
    """A retriever that finds always the same."""

    documents: list[Document]

    def _get_relevant_documents(self, query, *, run_manager):
        return self.documents


class Runs(BaseCallbackHandler):
    """Notes how runs begin and end."""

    def __init__(self):
        self.starts: list[dict[str, Any]] = []
        self.outputs: list[Any] = []
        self.errors: list[BaseException] = []

    def on_chain_start(self, serialized, inputs, **rest):
        self.starts.append({"inputs": inputs, **rest})

    def on_chain_end(self, outputs, **rest):
        self.outputs.append(outputs)

    def on_chain_error(self, error, **rest):
        self.errors.append(error)


class AsyncRuns(AsyncCallbackHandler):
    """As Runs, for handlers that are awaited."""

    def __init__(self):
        self.names: list[str] = []

    async def on_chain_start(self, serialized, inputs, **rest):
        self.names.append(rest["name"])


def found(texts=TEXTS):
    return [Document(text, id=f"d{n}", metadata={"n": n}) for n, text in enumerate(texts)]


def numbers(documents):
    return [document.metadata["n"] for document in documents]


def scores(documents):
    return [document.metadata["relevance_score"] for document in documents]


def compressing(reranker, documents=None):
    return ContextualCompressionRetriever(
        base_compressor=reranker, base_retriever=Finds(documents=found() if documents is None else documents)
    )


def keywords(**fields):
    return ScorerReranker(scorer=KeywordScorer(), **fields)


@pytest.fixture(params=[LocalReranker, ScorerReranker])
def in_process(request, minilm, local):
    """The rerankers that run MiniLM here."""
    fields = {"scorer": local} if request.param is ScorerReranker else {"model": minilm, "dtype": "float32"}
    with request.param(top_n=None, **fields) as reranker:
        yield reranker


def served(server, **fields):
    return VLLMReranker(base_url=server.base_url, api_key=server.api_key, top_n=None, timeout=120, **fields)


# --- In a retriever ---------------------------------------------------------------------------------------------------


def assert_retrievers_rank_as(folder, reranker):
    """Behind ContextualCompressionRetriever, sync and async, order and scores are those of Scorer.rerank."""
    with LocalScorer(folder, dtype="float32") as scorer:
        expected = scorer.rerank(QUERY, TEXTS)

    async def ask():
        # The last call: what a loop has opened is closed in it.
        documents = await compressing(reranker).ainvoke(QUERY)
        await reranker.aclose()
        return documents

    for documents in (compressing(reranker).invoke(QUERY), asyncio.run(ask())):
        assert scores(documents) == pytest.approx([place.score for place in expected], abs=1e-4)
        assert [TEXTS[n] for n in numbers(documents)] == [TEXTS[place.index] for place in expected]


def test_a_retriever_ranks_in_process(in_process, minilm):
    """LocalReranker and ScorerReranker rank a retriever's documents as the scorer does."""
    assert_retrievers_rank_as(minilm, in_process)


def test_a_retriever_ranks_with_a_served_bi_encoder(vllm_minilm):
    """VLLMReranker gives the scores of the same model in this process."""
    assert_retrievers_rank_as(vllm_minilm.folder, served(vllm_minilm))


def test_a_retriever_ranks_with_a_served_cross_encoder(vllm_cross_encoder):
    """So it does with a cross-encoder, on a server that wants a key."""
    assert_retrievers_rank_as(vllm_cross_encoder.folder, served(vllm_cross_encoder))


def test_every_reranker_is_a_compressor_and_a_runnable():
    """One object serves retrievers and chains; its input has a schema."""
    for reranker in (keywords(), LocalReranker(), VLLMReranker()):
        assert isinstance(reranker, BaseDocumentCompressor)
        assert reranker.get_name() == type(reranker).__name__
        schema = reranker.get_input_schema().model_json_schema()["$defs"]["RerankInput"]
        assert schema["required"] == ["query", "documents"]


def test_signatures_are_those_of_the_base_class():
    """LangChain looks for a parameter named `callbacks`."""
    for name in ("compress_documents", "acompress_documents"):
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (VLLMReranker, BaseDocumentCompressor))
        assert list(ours.parameters) == list(theirs.parameters)
        assert ours.parameters["callbacks"].default is None


def test_a_pipeline_of_compressors_passes_documents_through():
    """DocumentCompressorPipeline calls later stages with nothing when an earlier one kept nothing."""
    some, none = keywords(top_n=2), keywords(score_threshold=99)
    assert numbers(DocumentCompressorPipeline(transformers=[some]).compress_documents(found(), QUERY)) == [1, 3]
    assert DocumentCompressorPipeline(transformers=[none, some]).compress_documents(found(), QUERY) == []


def test_two_rerankers_share_one_scorer():
    """ScorerReranker takes a scorer and leaves it to its owner."""
    scorer = KeywordScorer()
    with ScorerReranker(scorer=scorer, top_n=1) as first, ScorerReranker(scorer=scorer, top_n=2) as second:
        assert len(first.compress_documents(found(), QUERY)) == 1
        assert len(second.compress_documents(found(), QUERY)) == 2
    assert scorer.score("a", ["a"]) == [1.0], "closing a reranker has closed the owner's scorer"
    assert scorer.calls == 3


# --- Documents out ----------------------------------------------------------------------------------------------------


def test_documents_are_copied_and_never_changed():
    """Two calls with one list don't meet: inputs stay equal to what they were, and each result has its own metadata."""
    documents = found()
    before = copy.deepcopy(documents)
    first = keywords().compress_documents(documents, QUERY)
    second = keywords().compress_documents(documents, "bread")
    assert documents == before
    assert scores(first) == [4.0, 4.0, 2.0]
    assert scores(second) == [1.0, 0.0, 0.0]
    assert first[0].metadata == {"n": 1, "relevance_score": 4.0}


def test_ids_subclasses_and_strange_metadata_survive():
    """A copy is of the same class with the same id, and shares values that can't be copied."""
    lock = threading.Lock()
    [result] = keywords().compress_documents([Passage("bears", id="p7", page=7, metadata={"lock": lock})], QUERY)
    assert type(result) is Passage
    assert (result.id, result.page) == ("p7", 7)
    assert result.metadata["lock"] is lock


def test_results_are_a_list_of_plain_floats():
    """Scores can be written as JSON; any sequence of documents will do."""
    result = keywords().compress_documents(tuple(found()), QUERY)
    assert type(result) is list
    assert {type(score) for score in scores(result)} == {float}


@pytest.mark.parametrize(("top_n", "kept"), [(None, 5), (3, 3), (1, 1), (50, 5)])
def test_top_n_cuts_the_list(top_n, kept):
    """None keeps all, and more than there are is no error."""
    assert numbers(keywords(top_n=top_n).compress_documents(found(), QUERY)) == BEST_FIRST[:kept]


def test_top_n_is_3_unless_told_otherwise():
    """3 is what LangChain's own rerankers keep."""
    assert len(keywords().compress_documents(found(), QUERY)) == 3


def test_the_threshold_applies_before_top_n():
    """A score at the threshold stays; when none reaches it the result is empty."""
    assert numbers(keywords(score_threshold=2, top_n=None).compress_documents(found(), QUERY)) == [1, 3, 2]
    assert numbers(keywords(score_threshold=2, top_n=2).compress_documents(found(), QUERY)) == [1, 3]
    assert keywords(score_threshold=5).compress_documents(found(), QUERY) == []


def test_ties_and_duplicates_stay_in_retrieval_order():
    """Equal documents are all kept, in the order in which they were found."""
    assert numbers(keywords(top_n=None).compress_documents(found(["same"] * 4), "other")) == [0, 1, 2, 3]


def test_nothing_in_nothing_out():
    """No documents: no run, no model, no request."""
    runs, scorer = Runs(), KeywordScorer()
    reranker = ScorerReranker(scorer=scorer)
    unreachable = VLLMReranker(base_url="http://127.0.0.1:1")
    assert reranker.compress_documents([], QUERY, callbacks=[runs]) == []
    assert asyncio.run(reranker.acompress_documents([], QUERY, callbacks=[runs])) == []
    assert unreachable.compress_documents([], QUERY) == []
    assert (runs.starts, scorer.calls) == ([], 0)


def test_an_earlier_score_is_replaced():
    """Where metadata already has a relevance_score, the new one wins; another score_key keeps both."""
    document = Document("bears", metadata={"relevance_score": 99.0})
    assert keywords().compress_documents([document], QUERY)[0].metadata == {"relevance_score": 1.0}
    second = keywords(score_key="second").compress_documents([document], QUERY)
    assert second[0].metadata == {"relevance_score": 99.0, "second": 1.0}


def test_a_formatter_chooses_the_text_that_is_scored():
    """document_formatter sees the document, so that a title in metadata can count; it must return text."""
    documents = [Document("x", metadata={"n": 0, "title": "y"}), Document("x", metadata={"n": 1, "title": "bears"})]
    titled = keywords(document_formatter=lambda document: document.metadata["title"])
    assert numbers(titled.compress_documents(documents, QUERY)) == [1, 0]
    with pytest.raises(TypeError, match=r"must return str, got int for documents\[0\]"):
        keywords(document_formatter=lambda _: 3).compress_documents(documents, QUERY)


# --- Failure ----------------------------------------------------------------------------------------------------------


def test_passthrough_keeps_retrieval_order_without_scores(caplog):
    """A failure costs the ranking, not the documents: one warning, no score key, not even an old one."""
    documents = [Document(text, metadata={"n": n, "relevance_score": 0.5}) for n, text in enumerate(TEXTS)]
    reranker = ScorerReranker(scorer=BrokenScorer(), on_error="passthrough")
    for result in (
        reranker.compress_documents(documents, QUERY),
        asyncio.run(reranker.acompress_documents(documents, QUERY)),
    ):
        assert [document.metadata for document in result] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert len(caplog.records) == 2


def test_a_missing_server_is_an_error_in_the_retriever():
    """Nobody listens: BackendUnavailable reaches the caller, sync and async, and never an empty list."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    retriever = compressing(VLLMReranker(base_url=f"http://127.0.0.1:{free}", max_retries=0))
    with pytest.raises(BackendUnavailable, match=f"127.0.0.1:{free}"):
        retriever.invoke(QUERY)
    with pytest.raises(BackendUnavailable, match=f"127.0.0.1:{free}"):
        asyncio.run(retriever.ainvoke(QUERY))


@pytest.mark.parametrize(
    ("documents", "query", "message"),
    [
        (found(), None, "query must be str, got NoneType"),
        (None, QUERY, "documents must be a sequence of Document, got NoneType"),
        ([*found(), "text"], QUERY, r"documents\[5\] must be a Document, got str"),
        (
            [Document("a"), Document.model_construct(page_content=None, id="x", metadata={})],
            QUERY,
            r"documents\[1\] \(id='x'\): page_content must be str, got NoneType",
        ),
    ],
)
def test_wrong_types_are_named_with_their_position(documents, query, message):
    """TypeError before anything is scored, and not passed through."""
    scorer = KeywordScorer()
    reranker = ScorerReranker(scorer=scorer, on_error="passthrough")
    with pytest.raises(TypeError, match=message):
        reranker.compress_documents(documents, query)
    with pytest.raises(TypeError, match=message):
        asyncio.run(reranker.acompress_documents(documents, query))
    assert scorer.calls == 0


# --- In a chain -------------------------------------------------------------------------------------------------------


def test_a_chain_reranks_what_it_retrieved():
    """Both chains that the error message below names work; keys that are no concern of the reranker are ignored."""
    reranker, retriever = keywords(), Finds(documents=found())
    assigned = RunnablePassthrough.assign(documents=itemgetter("query") | retriever) | reranker
    assert numbers(assigned.invoke({"query": QUERY, "user": "u1"})) == [1, 3, 2]
    mapped = {"query": RunnablePassthrough(), "documents": retriever} | reranker
    assert numbers(asyncio.run(mapped.ainvoke(QUERY))) == [1, 3, 2]


@pytest.mark.parametrize("given", [found(), {"question": QUERY, "documents": []}])
def test_a_wrong_chain_is_explained(given):
    """A retriever piped straight into a reranker loses the query: the error shows the chain that keeps it."""
    with pytest.raises(TypeError, match=r'RunnablePassthrough\.assign\(documents=itemgetter\("query"\) \| retriever\)'):
        (RunnableLambda(lambda _: given) | keywords()).invoke(QUERY)


def test_limits_can_be_given_per_call():
    """top_n and score_threshold of a call take the place of the fields, None included; other names are refused."""
    reranker, given = keywords(top_n=1), {"query": QUERY, "documents": found()}
    assert numbers(reranker.invoke(given, top_n=None)) == BEST_FIRST
    assert numbers(reranker.bind(top_n=2).invoke(given)) == [1, 3]
    assert numbers(asyncio.run(reranker.ainvoke(given, top_n=None, score_threshold=2))) == [1, 3, 2]
    assert numbers(reranker.invoke(given)) == [1]
    with pytest.raises(TypeError, match="'top_k'"):
        reranker.invoke(given, top_k=3)
    with pytest.raises(ValueError, match="top_n must be at least 1"):
        reranker.invoke(given, top_n=0)


def test_batches_keep_their_order(local):
    """Batch runs in threads and abatch in one loop; both answer in the order of the inputs."""
    reranker = ScorerReranker(scorer=local, top_n=1)
    queries = ["baking", "hibernation of bears", "a good night's rest", "fishing"]
    inputs = [{"query": query, "documents": found()} for query in queries]
    expected = [numbers(reranker.invoke(given)) for given in inputs]
    assert [numbers(result) for result in reranker.batch(inputs)] == expected
    assert [numbers(result) for result in asyncio.run(reranker.abatch(inputs))] == expected


def test_async_calls_need_no_thread():
    """An async call awaits the scorer itself instead of sending the sync call to a thread pool."""
    reranker = ScorerReranker(scorer=NativeScorer())
    assert numbers(asyncio.run(reranker.acompress_documents(found(), QUERY))) == [1, 3, 2]


def test_one_reranker_outlives_its_event_loops(in_process):
    """Scripts and notebooks call asyncio.run again and again with the same reranker."""
    first, second = (asyncio.run(in_process.acompress_documents(found(), QUERY)) for _ in range(2))
    assert first == second


def test_one_served_reranker_outlives_its_event_loops(vllm_cross_encoder):
    """A connection dies with its loop: the next loop opens its own."""
    with served(vllm_cross_encoder) as reranker:
        first, second = (asyncio.run(reranker.acompress_documents(found(), QUERY)) for _ in range(2))
    assert numbers(first) == numbers(second)


# --- In traces --------------------------------------------------------------------------------------------------------


def test_a_call_is_one_run():
    """One run named after the class has what went in, what came out, and which model ranked."""
    for call in ("compress_documents", "acompress_documents"):
        runs = Runs()
        result = getattr(keywords(top_n=2), call)(found(), QUERY, callbacks=[runs])
        result = asyncio.run(result) if call.startswith("a") else result
        [start] = runs.starts
        assert start["name"] == "ScorerReranker"
        assert start["inputs"] == {"query": QUERY, "documents": found()}
        assert runs.outputs == [result]
        expected = {
            "ls_provider": "rag_rerank",
            "ls_model_name": "keywords",
            "rerank_top_n": 2,
            "rerank_num_documents": 5,
        }
        assert expected.items() <= start["metadata"].items()


def test_the_run_belongs_to_the_retriever_that_called():
    """Under ContextualCompressionRetriever, sync and async, the rerank is a child of the retriever's run."""
    retriever = compressing(keywords(name="Ranking"))
    for invoke in (retriever.invoke, lambda *given: asyncio.run(retriever.ainvoke(*given))):
        runs = Runs()
        invoke(QUERY, {"callbacks": [runs], "metadata": {"user": "u1"}})
        [start] = runs.starts
        assert start["name"] == "Ranking"
        assert start["parent_run_id"] is not None
        assert start["metadata"]["user"] == "u1"


def test_async_handlers_are_told_too():
    """Handlers whose methods are coroutines see the run of an async call."""
    runs = AsyncRuns()
    asyncio.run(compressing(keywords()).ainvoke(QUERY, {"callbacks": [runs]}))
    assert runs.names == ["ScorerReranker"]


def test_a_failed_call_is_a_failed_run():
    """The error that the caller gets stands in the trace as well."""
    runs = Runs()
    with pytest.raises(BackendUnavailable) as caught:
        ScorerReranker(scorer=BrokenScorer()).compress_documents(found(), QUERY, callbacks=[runs])
    assert runs.errors == [caught.value]
    assert runs.outputs == []


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"top_n": 0},
        {"top_n": -1},
        {"score_threshold": float("nan")},
        {"score_threshold": float("inf")},
        {"score_key": ""},
        {"on_error": "ignore"},
        {"top_k": 3},
        {"k": 3},
        {"model_name": "m"},
        {"url": "http://localhost:8000"},
    ],
)
def test_wrong_and_unknown_fields_are_refused(fields):
    """A mistyped name is an error, not a setting that never applies; and so is a later assignment."""
    for cls in (LocalReranker, VLLMReranker, keywords):
        with pytest.raises(ValidationError):
            cls(**fields)
    reranker = VLLMReranker()
    with pytest.raises(ValidationError):
        setattr(reranker, *next(iter(fields.items())))
    assert reranker == VLLMReranker()


@pytest.mark.parametrize(("reranker", "scorer"), [(LocalReranker, LocalScorer), (VLLMReranker, VLLMScorer)])
def test_every_setting_of_the_scorer_is_a_field(reranker, scorer):
    """Names and defaults are the scorer's own, so that nothing can be set in one place only."""
    theirs = {name: parameter.default for name, parameter in inspect.signature(scorer).parameters.items()}
    fields = {name: field.default for name, field in reranker.model_fields.items()}
    assert theirs.items() <= fields.items()
    assert fields.keys() - theirs.keys() == ScorerReranker.model_fields.keys() - {"scorer"}


def test_a_setting_that_cannot_work_is_reported_at_construction():
    """ConfigError comes as itself, so that `except RerankError` catches it, and long before the first query."""
    with pytest.raises(ConfigError, match="dtype must be one of"):
        LocalReranker(dtype="float8")
    with pytest.raises(ConfigError):
        VLLMReranker(base_url="ftp://localhost")


def test_construction_loads_nothing_and_sends_nothing():
    """A model that does not exist and a server that does not run are found out by the first call."""
    began = time.perf_counter()
    LocalReranker(model="/nowhere")
    VLLMReranker(base_url="http://192.0.2.1")
    assert time.perf_counter() - began < 1


def test_changed_fields_reach_the_scorer(minilm):
    """Assignment and model_copy(update=...) give a scorer that fits; what has not changed keeps its loaded model."""
    reranker = LocalReranker(model="/nowhere", dtype="float32")
    before = reranker.scorer
    reranker.top_n = 1
    assert reranker.scorer is before
    assert reranker.model_copy(update={"top_n": 2}).scorer is before

    elsewhere = reranker.model_copy(update={"model": str(minilm)})
    reranker.model = minilm
    assert reranker.scorer.model_name == elsewhere.scorer.model_name == str(minilm)
    with reranker:
        assert len(reranker.compress_documents(found(), QUERY)) == 1


def test_a_closed_reranker_says_so():
    """Closing twice is harmless, using it afterwards is an error that says what to do."""
    with VLLMReranker() as reranker:
        reranker.close()
    with pytest.raises(RerankError, match="closed"):
        reranker.compress_documents(found(), QUERY)

    async def closed():
        async with VLLMReranker() as reranker:
            pass
        await reranker.acompress_documents(found(), QUERY)

    with pytest.raises(RerankError, match="closed"):
        asyncio.run(closed())


# --- Secrets, dumps and copies ----------------------------------------------------------------------------------------


def test_the_key_is_told_to_nobody_but_the_server():
    """No repr, dump, pickle or error has it, of the reranker, its scorer or a retriever around it."""
    reranker = VLLMReranker(api_key=KEY, base_url="http://127.0.0.1:1", max_retries=0)
    retriever = compressing(reranker)
    with pytest.raises(BackendUnavailable) as unreachable:
        reranker.compress_documents(found(), QUERY)
    with pytest.raises(ValidationError) as refused:
        VLLMReranker(api_key=KEY, secret_key=KEY)
    with pytest.raises(ConfigError) as malformed:
        VLLMReranker(api_key=KEY + "\n")
    told = [
        *(show(thing) for show in (repr, str, dumps, dumpd) for thing in (reranker, reranker.scorer, retriever)),
        reranker.model_dump(),
        reranker.model_dump_json(),
        pickle.dumps(reranker),
        pickle.dumps(reranker.scorer),
        *(error.value for error in (unreachable, refused, malformed)),
    ]
    assert not [shown for shown in map(str, told) if KEY in shown]
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        LocalReranker(model_kwargs={"token": KEY})


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
def test_a_dump_reads_back():
    """langchain_core.load gives back an equal reranker, the key taken from the secrets of the reader."""
    reranker = VLLMReranker(api_key=KEY, model="m", top_n=None, score_threshold=0.0, truncate_prompt_tokens=None)
    assert reranker.is_lc_serializable()
    assert dumpd(reranker)["id"] == ["langchain_rag_rerank", "VLLMReranker"]
    again = loads(
        dumps(reranker),
        allowed_objects=[VLLMReranker],
        valid_namespaces=["langchain_rag_rerank"],
        secrets_map={"VLLM_API_KEY": KEY},
    )
    assert again == reranker
    assert again.api_key == SecretStr(KEY)


def test_a_scorer_is_not_dumped():
    """What holds a live object is marked as not implemented instead of being dumped without it."""
    assert dumpd(keywords())["type"] == "not_implemented"


def assert_copies_rank_alike(reranker):
    expected = numbers(reranker.compress_documents(found(), QUERY))
    copies = [copy.copy(reranker), copy.deepcopy(reranker), reranker.model_copy(), reranker.model_copy(deep=True)]
    assert {id(each.scorer) for each in copies} == {id(reranker.scorer)}
    assert all(numbers(each.compress_documents(found(), QUERY)) == expected for each in copies)


def test_copies_share_the_loaded_model(in_process):
    """A copy, deep or not, ranks as the original does and loads no second model."""
    assert_copies_rank_alike(in_process)


def test_copies_keep_the_key(vllm_cross_encoder):
    """A copy, deep or not, is let in by the server that wants a key."""
    with served(vllm_cross_encoder) as reranker:
        assert_copies_rank_alike(reranker)


def test_a_pickled_reranker_loads_its_own_model(in_process):
    """The copy works on its own; closing it leaves the original open."""
    expected = numbers(in_process.compress_documents(found(), QUERY))
    with pickle.loads(pickle.dumps(in_process)) as reranker:  # noqa: S301
        assert numbers(reranker.compress_documents(found(), QUERY)) == expected
        assert reranker.scorer is not in_process.scorer
        reranker.scorer.close()
    assert numbers(in_process.compress_documents(found(), QUERY)) == expected


def test_a_pickled_reranker_takes_the_key_from_its_environment(vllm_cross_encoder, monkeypatch):
    """The key does not travel: a process without it is refused, one that has it in VLLM_API_KEY is let in."""
    server = vllm_cross_encoder
    sent = pickle.dumps(served(server))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pickle.loads(sent) as reranker, pytest.raises(AuthError):  # noqa: S301
        reranker.compress_documents(found(), QUERY)
    monkeypatch.setenv("VLLM_API_KEY", server.api_key)
    with pickle.loads(sent) as reranker:  # noqa: S301
        assert len(reranker.compress_documents(found(), QUERY)) == 5


# --- Import -----------------------------------------------------------------------------------------------------------


def test_importing_brings_only_what_langchain_core_brings():
    """Neither torch nor an HTTP client nor langchain-classic, until a reranker needs them; nor by construction."""
    program = """if True:
        import sys
        import langchain_core.callbacks, langchain_core.documents, langchain_core.runnables
        before = set(sys.modules)
        import langchain_rag_rerank
        heavy = {"torch", "transformers", "sentence_transformers", "httpx", "langchain_classic", "langchain_community"}
        print(heavy & (set(sys.modules) - before), "rag_rerank.local" in sys.modules)
        langchain_rag_rerank.LocalReranker()
        print(heavy & (set(sys.modules) - before))
    """
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], env=path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "False", "set()"]


def test_only_public_names_of_the_core_are_used():
    """The adapter stands on rag_rerank.__all__, which versions may not change at will."""
    named = set(re.findall(r"\brag_rerank\.(\w+)", inspect.getsource(langchain_rag_rerank.rerank)))
    assert {"LocalScorer", "VLLMScorer"} <= named <= set(rag_rerank.__all__)
