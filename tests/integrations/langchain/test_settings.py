"""Fields: which there are, what they refuse, and how changes reach the scorer."""

import asyncio
import inspect
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError

from langchain_rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from rag_rerank import ConfigError, LocalScorer, RerankError, VLLMScorer
from tests.faulty_server import FaultyServer
from tests.integrations.langchain.common import QUERY, KeywordScorer, found, keywords


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
def test_wrong_and_unknown_fields_are_refused(fields: dict[str, Any]):
    """A mistyped name is an error, not a setting that never applies; and so is a later assignment."""
    for cls in (LocalReranker, VLLMReranker, keywords):
        with pytest.raises(ValidationError):
            cls(**fields)
    reranker = VLLMReranker()
    with pytest.raises(ValidationError):
        setattr(reranker, *next(iter(fields.items())))
    assert reranker == VLLMReranker()


@pytest.mark.parametrize(
    ("cls", "wrong", "meant"),
    [
        (LocalReranker, "top_k", "top_n"),
        (LocalReranker, "k", "top_n"),
        (LocalReranker, "n", "top_n"),
        (LocalReranker, "model_name", "model"),
        (LocalReranker, "score_treshold", "score_threshold"),
        (LocalReranker, "normalize", "use_activation"),
        (LocalReranker, "api_key", None),
        (VLLMReranker, "vllm_api_key", "api_key"),
        (VLLMReranker, "cohere_api_key", "api_key"),
        (VLLMReranker, "url", "base_url"),
        (VLLMReranker, "device", None),
        (VLLMReranker, "batch_size", "chunk_size"),
        (keywords, "top_k", "top_n"),
        (keywords, "scorers", "scorer"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_one(cls: Any, wrong: str, meant: str | None):
    """Where there is a likely one; the value is repeated nowhere, for it may be a key."""
    with pytest.raises(ValidationError) as caught:
        cls(**{wrong: "canary-value"})
    hint = f"did you mean {meant}?" if meant else "Extra inputs are not permitted"
    assert hint in str(caught.value)
    assert ("did you mean" in str(caught.value)) == bool(meant)
    [error] = caught.value.errors()
    assert (error["type"], error["loc"]) == ("extra_forbidden", (wrong,))
    assert "canary-value" not in repr(caught.value) + str(caught.value.errors())


def test_a_class_of_ones_own_may_have_more_fields():
    """Its aliases are no wrong names, and the scorer is not told of either."""

    class Mine(VLLMReranker):
        team: str = Field(default="", alias="owner")
        weight: float = 1.0

    mine = Mine(owner="search", weight=2.0, timeout=1.0)
    assert (mine.team, mine.weight, mine.timeout) == ("search", 2.0, 1.0)
    with pytest.raises(ValidationError, match=r"did you mean weight\?"):
        Mine(wieght=1.0)


def test_several_wrong_names_are_named_at_once():
    """And a wrong assignment has the same hint."""
    with pytest.raises(ValidationError, match=r"2 validation errors(.|\n)*model_name(.|\n)*top_k"):
        VLLMReranker(top_k=3, model_name="m")
    with pytest.raises(ValidationError, match=r"did you mean top_n\?"):
        VLLMReranker().top_k = 3


@pytest.mark.parametrize(("reranker", "scorer"), [(LocalReranker, LocalScorer), (VLLMReranker, VLLMScorer)])
def test_every_setting_of_the_scorer_is_a_field(reranker: type, scorer: type):
    """Names and defaults are the scorer's own, so that nothing can be set in one place only."""
    theirs = {name: parameter.default for name, parameter in inspect.signature(scorer).parameters.items()}
    fields = {name: field.default for name, field in reranker.model_fields.items()}
    assert theirs.items() <= fields.items()
    assert fields.keys() - theirs.keys() == ScorerReranker.model_fields.keys() - {"scorer"} | {"calibration"}


@pytest.mark.parametrize(
    ("cls", "scorer"), [(LocalReranker, LocalScorer), (VLLMReranker, VLLMScorer), (ScorerReranker, None)]
)
def test_every_field_is_described(cls: type, scorer: type | None):
    """In the docstring of its class, or of `ScorerReranker` or the scorer, both of which it names."""

    def named(described: type) -> set[str]:
        arguments = inspect.getdoc(described).partition("Args:")[2].partition("Raises:")[0]
        return {name.strip() for line in arguments.splitlines() for name in line.partition(":")[0].split(",")}

    names = named(cls)
    if scorer is not None:
        assert f"`rag_rerank.{scorer.__name__}`" in inspect.getdoc(cls)
        assert "`ScorerReranker`" in inspect.getdoc(cls)
        names |= named(scorer) | named(ScorerReranker)
    assert cls.model_fields.keys() <= names


@pytest.mark.parametrize("cls", [ScorerReranker, LocalReranker, VLLMReranker])
def test_schemas_list_the_fields(cls: Any):
    """The JSON schema, which forms and tools are made from; without what JSON can't hold."""
    properties = cls.model_json_schema()["properties"]
    assert {"top_n", "score_threshold", "on_error"} <= properties.keys()
    assert not {"scorer", "document_formatter"} & properties.keys()


def test_a_setting_that_cannot_work_is_reported_at_construction():
    """ConfigError comes as itself, so that `except RerankError` catches it, and long before the first query."""
    with pytest.raises(ConfigError, match="dtype must be one of"):
        LocalReranker(dtype="float8")
    with pytest.raises(ConfigError):
        VLLMReranker(base_url="ftp://localhost")


def test_construction_loads_nothing_and_sends_nothing():
    """A model that does not exist and a server that does not run are found out by the first call."""
    with FaultyServer() as server:
        LocalReranker(model="/nowhere")
        reranker = VLLMReranker(base_url=server.base_url)
        assert server.connections == 0
        assert len(reranker.compress_documents(found(), QUERY)) == 3
        assert server.connections > 0
    assert not [thread for thread in threading.enumerate() if "/nowhere" in thread.name]


def test_changed_fields_reach_the_scorer(minilm: Path):
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


def test_a_changed_setting_that_cannot_work_is_reported_by_the_next_call():
    """And once it is mended, the next call works again."""
    reranker = VLLMReranker()
    before = reranker.scorer
    reranker.timeout = -1
    with pytest.raises(ConfigError, match="timeout"):
        reranker.compress_documents(found(), QUERY)
    results = reranker.batch([{"query": QUERY, "documents": found()}] * 2, return_exceptions=True)
    assert [type(result) for result in results] == [ConfigError] * 2
    reranker.timeout = 30.0
    assert reranker.scorer is before


def test_paths_are_kept_as_text(tmp_path: Path):
    """LangChain's dumps have no form for a path."""
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0]['content'] }} {{ messages[1]['content'] }}")
    reranker = LocalReranker(model=tmp_path, cache_dir=tmp_path, template=template)
    assert (reranker.model, reranker.cache_dir, reranker.template) == (str(tmp_path), str(tmp_path), str(template))
    assert VLLMReranker(template=template, truncate_prompt_tokens=None).template == str(template)


def test_a_scorer_must_be_one():
    """Not its class, nor its name."""
    for scorer in (KeywordScorer, "keywords", None):
        with pytest.raises(ValidationError, match="instance of Scorer"):
            ScorerReranker(scorer=scorer)


def test_a_closed_reranker_says_so():
    """Closing twice is harmless, using it afterwards is an error that says what to do."""
    with VLLMReranker() as reranker:
        reranker.close()
    with pytest.raises(RerankError, match="closed"):
        reranker.compress_documents(found(), QUERY)

    async def closed() -> None:
        async with VLLMReranker() as reranker:
            pass
        await reranker.acompress_documents(found(), QUERY)

    with pytest.raises(RerankError, match="closed"):
        asyncio.run(closed())
