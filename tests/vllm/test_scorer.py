"""Who a scorer's servers are, and an instruction for a call."""

import asyncio
import json
import math
import pickle
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from rag_rerank import BackendUnavailable, ConfigError, DeadlineExceeded, VLLMScorer
from rag_rerank.inputs import preparing
from rag_rerank.inputs.preparing import MANY
from tests.faulty_server import HANG, FaultyServer, Request, Steps, http, on_scores, oracle, refusal, right, scores
from tests.vllm.faults.common import closed_port

TEMPLATE = '{{ instruction or "Judge." }}\nQ: {{ messages[0].content }}\nD: {{ messages[1].content }}\n'


def serves(root: str = "org/m", *, shift: float = 0.0, name: str = "m") -> Callable[[Request], Steps | None]:
    """A model of that checkpoint, whose scores are so much higher than another's."""

    def behave(request: Request) -> Steps:
        if request.path == "/v1/models":
            return [http(json.dumps({"data": [{"id": name, "root": root, "max_model_len": 512}]}))]
        if not request.wants_scores:
            return right(request)
        if request.content["model"] != name:
            return refusal(404, "The model does not exist.")
        content = scores(request)
        for entry in content["data"]:
            entry["score"] += shift
        return [http(json.dumps(content))]

    return behave


def identity_of(server: FaultyServer, **settings: Any):
    with VLLMScorer(server.base_url, **settings) as scorer:
        return scorer.identity()


def test_without_an_event_loop_of_asyncio_a_call_says_so():
    """As in trio, where asyncio's own words would tell nobody what to do."""
    with pytest.raises(ConfigError, match="trio"):
        VLLMScorer("http://127.0.0.1:1").ascore("q", ["a"]).send(None)


class TestIdentity:
    """What resumed runs and caches compare."""

    def test_the_same_server_is_the_same(self):
        """Asked twice, by two scorers, by a copy, and after a restart; how fast it is asked changes nothing."""
        with FaultyServer(serves()) as server, VLLMScorer(server.base_url) as scorer:
            first = scorer.identity()
            assert first.differences(scorer.identity()) == []
            assert (
                identity_of(server, chunk_size=1, max_concurrency=1, priority=3, timeout=5.0).differences(first) == []
            )
            with pickle.loads(pickle.dumps(scorer)) as copy:  # noqa: S301
                assert copy.identity().differences(first) == []
            server.kill()
            server.revive()
            assert scorer.identity().differences(first) == []
            assert (first.place, first.steady, len(first.probes)) == (server.base_url, True, 4)

    @pytest.mark.parametrize(
        ("behave", "differs"),
        [
            (serves("org/other"), "checkpoint: org/other, before org/m"),
            (serves(name="n"), "model: n, before m"),
            (serves(shift=0.5), "scores of the probe"),
        ],
        ids=["checkpoint", "name", "scores"],
    )
    def test_another_model_behind_the_same_url(self, behave: Callable[[Request], Steps | None], differs: str):
        """For a scorer that lives on as for a new one; half precision is no other model."""
        with FaultyServer(serves()) as server, VLLMScorer(server.base_url) as scorer:
            before = scorer.identity()
            server.behave = serves(shift=1e-3)
            assert scorer.identity().differences(before) == []
            server.kill()
            server.revive()
            server.behave = behave
            assert any(text.startswith(differs) for text in identity_of(server).differences(before))
            assert any(text.startswith(differs) for text in scorer.identity().differences(before))

    @pytest.mark.parametrize(
        "settings",
        [
            {"use_activation": False},
            {"truncate_prompt_tokens": None},
            {"truncate_prompt_tokens": -1},
            {"truncate_prompt_tokens": 100},
            {"max_tokens_per_doc": 100},
            {"max_tokens_per_query": 100},
            {"instruction": "Judge."},
            {"chat_template_kwargs": {"x": [1]}},
            {"query_prompt": "query: "},
            {"document_prompt": "passage: "},
            {"template": TEMPLATE, "truncate_prompt_tokens": None},
            {"extra_body": {"softmax": True}},
        ],
        ids=str,
    )
    def test_another_option(self, settings: dict[str, Any]):
        """Each that can change a score is named, whether or not it changes those of the probe."""
        with FaultyServer(serves()) as server:
            found = identity_of(server, **settings).differences(identity_of(server))
        assert any(text.startswith(f"{next(iter(settings))}: ") for text in found)

    def test_another_template_and_instruction(self):
        """Rendered here; as long as they are, they are told from one another in one line."""
        with FaultyServer(serves()) as server:
            first = identity_of(server, template=TEMPLATE)
            other = identity_of(
                server, template=TEMPLATE.replace("Q:", "?:") + "{# " + 500 * "x" + " #}", instruction="i"
            )
        found = other.differences(first)
        assert [text.partition(":")[0] for text in found][:2] == ["instruction", "template"]
        assert all(len(text) < 400 for text in found)

    def test_no_secret_is_in_it(self):
        """Neither the key nor what looks like one in extra_body."""
        body = {"user": "me", "api_key": "canary1", "metadata": {"auth_token": "canary2", "x": 1}}
        with FaultyServer(serves()) as server:
            identity = identity_of(server, api_key="canary3", extra_body=body)
        assert "canary" not in json.dumps(asdict(identity))
        assert json.loads(identity.facts["extra_body"]) == {
            "user": "me",
            "api_key": "...",
            "metadata": {"auth_token": "...", "x": 1},
        }

    def test_the_deadline_is_for_all_of_it(self):
        """It ends with what a call ends with."""
        with (
            FaultyServer(on_scores(lambda request: [HANG])) as server,
            VLLMScorer(server.base_url) as scorer,
            pytest.raises(DeadlineExceeded),
        ):
            scorer.identity(deadline=0.2)
        with VLLMScorer(f"http://{closed_port()}", max_retries=0) as scorer, pytest.raises(BackendUnavailable):
            scorer.identity(deadline=math.inf)

    def test_several_servers(self):
        """One scorer, in two places."""
        with FaultyServer(serves()) as one, FaultyServer(serves()) as two:
            with VLLMScorer([one.base_url, two.base_url]) as scorer:
                identity = scorer.identity()
            assert identity.place == f"{one.base_url}, {two.base_url}"
            assert identity.differences(identity_of(two)) == []


class TestInstruction:
    """One for a call is the same as one for a scorer."""

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"instruction": "another"},
            {"chat_template_kwargs": {"instruction": "another", "x": 1}},
            {"template": TEMPLATE},
            {"template": TEMPLATE, "instruction": "another"},
            {"template": "qwen3-reranker", "chat_template_kwargs": {"instruction": "another"}},
        ],
        ids=str,
    )
    def test_the_same_is_sent(self, settings: dict[str, Any]):
        """In `score`, `rerank` and `rerank_batch`; the next call has the scorer's own again."""
        constructed = {
            **settings,
            "chat_template_kwargs": {
                name: value for name, value in settings.get("chat_template_kwargs", {}).items() if name != "instruction"
            },
            "instruction": "Find what helps.",
        }
        with FaultyServer() as server:

            def sent(scorer: VLLMScorer, **options: Any) -> list[Any]:
                with scorer:
                    server.requests.clear()
                    scorer.score("q", ["a", "b"], **options)
                    scorer.rerank("q", ["a", "b"], **options)
                    scorer.rerank_batch(["q", "r"], [["a"], ["b"]], **options)
                    return [
                        {name: value for name, value in request.content.items() if name != "request_id"}
                        for request in server.score_requests
                    ]

            own = sent(VLLMScorer(server.base_url, **settings))
            assert sent(VLLMScorer(server.base_url, **constructed)) == sent(
                VLLMScorer(server.base_url, **settings), instruction="Find what helps."
            )
            assert sent(VLLMScorer(server.base_url, **settings)) == own
            assert "Find what helps." not in str(own)

    def test_a_template_without_a_place_for_it(self):
        """It is said, not ignored: at construction, and for a call before anything is sent."""
        template = "Q: {{ messages[0].content }}\nD: {{ messages[1].content }}\n"
        with pytest.raises(ConfigError, match="has no place for an instruction"):
            VLLMScorer(template=template, instruction="i")
        with FaultyServer() as server, VLLMScorer(server.base_url, template=template) as scorer:
            assert len(scorer.score("q", ["a"])) == 1
            server.requests.clear()
            with pytest.raises(ConfigError, match="has no place for an instruction"):
                scorer.rerank("q", ["a"], instruction="i", on_error="passthrough")
            assert server.requests == []

    def test_a_server_that_knows_none(self):
        """vLLM before 0.22 would ignore it."""

        def old(request: Request) -> Steps | None:
            return [http('{"version": "0.21.0"}')] if request.path == "/version" else None

        with (
            FaultyServer(old) as server,
            VLLMScorer(server.base_url) as scorer,
            pytest.raises(ConfigError, match="does not know instruction"),
        ):
            scorer.score("q", ["a"], instruction="i")

    def test_given_twice(self):
        """As an argument and as a variable: one of them would be ignored."""
        with pytest.raises(ConfigError, match="instruction is given twice"):
            VLLMScorer(instruction="i", chat_template_kwargs={"instruction": "j"})

    def test_many_of_them(self):
        """What is remembered of each has an end."""
        with FaultyServer() as server, VLLMScorer(server.base_url, template=TEMPLATE) as scorer:
            for number in range(100):
                scorer.score("q", ["a"], instruction=f"task {number}")
            assert [request.content["text_1"] for request in server.score_requests] == [
                f"task {number}\nQ: q\n" for number in range(100)
            ]
            assert len(scorer.client._halves) <= 64


def test_an_event_loop_runs_on_while_many_documents_are_prepared(monkeypatch: pytest.MonkeyPatch):
    """In a thread: here each waits there for what is set in the loop meanwhile."""
    turned, documents = threading.Event(), ["d"] * (2 * MANY)

    def cleaning(text: str) -> str:
        assert turned.wait(30)
        return text

    async def call(url: str) -> list[float]:
        async with VLLMScorer(url, chunk_size=MANY) as scorer:
            asking = asyncio.ensure_future(scorer.ascore("q", documents))
            await asyncio.sleep(0.01)
            turned.set()
            return await asking

    monkeypatch.setattr(preparing, "clean", cleaning)
    with FaultyServer() as server:
        assert asyncio.run(call(server.base_url)) == [oracle("q", "d")] * len(documents)
