"""Each option does on a real vLLM server what it does locally, or is refused by its name.

`make compat` runs these against older servers, too: it reads in the report which `row` of its table a test fills, and
what was `seen`.
"""

from collections.abc import Callable, Iterator

import pytest

from rag_rerank import ConfigError, DocumentRejected, LocalScorer, VLLMScorer
from rag_rerank.template import SHIPPED
from rag_rerank.vllm.wire import SINCE, WRONG_LOGITS
from tests import vllm_server
from tests.causal_models import MAX_POSITIONS, make_decoder_classifier
from tests.conftest import require_server
from tests.models import readable_by_transformers_4
from tests.pairs import largest_difference, pairs
from tests.vllm_server import VLLMServer

TOLERANCE = 1e-4
TEMPLATE = SHIPPED / "qwen3-reranker.jinja"
QUERY, DOCUMENTS = "How do I copy a file?", [text[:300] for text in pairs()[1][:12]]

Tell = Callable[[str, object], None]


def compare(server: VLLMServer, tell: Tell, row: str, here: dict[str, object], there: dict[str, object]) -> None:
    """The scores with an option, named differently `here` and `there`; that it changes them is seen first."""
    tell("row", row)
    with (
        LocalScorer(server.folder, dtype="float32") as plain,
        LocalScorer(server.folder, dtype="float32", **here) as local,
    ):
        expected = local.score(QUERY, DOCUMENTS)
        assert not here or largest_difference(plain.score(QUERY, DOCUMENTS), expected) > 0.01
    with VLLMScorer(server.base_url, api_key=server.api_key) as remote:
        version = remote_version(remote)
    with VLLMScorer(server.base_url, api_key=server.api_key, **there) as remote:
        new = [name for name in there if SINCE.get(name, (0, 0)) > version]
        new += ["use_activation"] * ("use_activation" in there and WRONG_LOGITS[0] <= version <= WRONG_LOGITS[1])
        if new:
            words = rf"vLLM {version[0]}\.{version[1]} (does not know \w+; it needs|gives wrong logits for this model)"
            with pytest.raises(ConfigError, match=words):
                remote.score(QUERY, DOCUMENTS)
        elif there.get("endpoint") == "rerank" and version < (0, 12):  # it cuts nothing
            with pytest.raises(DocumentRejected, match="maximum context length"):
                remote.score(QUERY, DOCUMENTS)
            new = ["rejected"]
        else:
            assert largest_difference(expected, remote.score(QUERY, DOCUMENTS)) <= TOLERANCE
    tell("seen", "equal" if not new else "rejected" if "endpoint" in there else "refused")


def remote_version(remote: VLLMScorer) -> tuple[int, int]:
    return remote.client.transport.run(remote.client.exchange(None).describe()).version


@pytest.mark.parametrize(
    ("row", "here", "there"),
    [
        ("`use_activation=False`", {"use_activation": False}, {"use_activation": False}),
        ("`truncate_prompt_tokens`", {"max_length": 40}, {"truncate_prompt_tokens": 40}),
        ("`max_tokens_per_query`", {"max_tokens_per_query": 2}, {"max_tokens_per_query": 2}),
        ("`max_tokens_per_doc`", {"max_tokens_per_doc": 20}, {"max_tokens_per_doc": 20}),
        ('`endpoint="rerank"`', {}, {"endpoint": "rerank"}),
    ],
)
def test_with_an_encoder(vllm_cross_encoder: VLLMServer, record_property: Tell, row: str, here: dict, there: dict):
    compare(vllm_cross_encoder, record_property, row, here, there)


@pytest.fixture(scope="module")
def vllm_templated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """A decoder whose pairs the server puts into a template."""
    require_server()
    folder = make_decoder_classifier(tmp_path_factory.mktemp("models") / "Qwen3-Reranker-tiny-seq-cls", "qwen3")
    readable_by_transformers_4(folder)
    options = "--chat-template", str(TEMPLATE), "--max-model-len", str(MAX_POSITIONS)
    with vllm_server.serving(folder, *options) as server:
        yield server


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ("a template on the server", {}),
        ("`instruction`", {"instruction": "Find bread."}),
        ("`chat_template_kwargs`", {"chat_template_kwargs": {"instruction": "Find bread."}}),
    ],
)
def test_with_a_template(vllm_templated: VLLMServer, record_property: Tell, row: str, options: dict[str, object]):
    compare(vllm_templated, record_property, row, options, options)


def test_over_long_documents_are_cut_around_a_template(vllm_templated: VLLMServer, record_property: Tell):
    """Or rejected, where the server can't; but never cut at the end, where the score is read."""
    record_property("row", "long documents, cut around a template")
    server, documents = vllm_templated, ["bread", "word " * 3000, "files"]
    with LocalScorer(server.folder, dtype="float32") as local, VLLMScorer(server.base_url) as remote:
        if remote_version(remote) >= SINCE["max_tokens_per_doc"]:
            assert largest_difference(local.score(QUERY, documents), remote.score(QUERY, documents)) <= TOLERANCE
            record_property("seen", "equal")
            return
        with pytest.raises(DocumentRejected, match="maximum context length") as caught:
            remote.score(QUERY, documents)
        assert caught.value.indices == (1,)
        record_property("seen", "rejected")
