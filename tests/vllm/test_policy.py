"""How a call goes, tested with a list of outcomes: no socket, no clock, no sleep."""

import contextlib
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank import (
    AuthError,
    BackendRejected,
    BackendUnavailable,
    BadReply,
    ConfigError,
    DeadlineExceeded,
    RerankError,
)
from rag_rerank.vllm.policy import Call, Failure, Send, Sleep
from rag_rerank.vllm.wire import Options, Reply, Server

SCORES = [0.25, 0.75]
GOOD = Reply(200, json.dumps({"data": [{"index": i, "score": s} for i, s in enumerate(SCORES)]}).encode())
REFUSED = Failure("connect", "can't connect: refused")
BUSY = Reply(503, b"busy")


class World:
    """Plays the driver: hands out outcomes in order, keeps what was asked, lets time pass on its own clock."""

    def __init__(self, *outcomes: Reply | Failure, deadline: float | None = None, seconds_each: float = 0.0) -> None:
        self.outcomes = list(outcomes)
        self.now = 100.0
        self.until = None if deadline is None else self.now + deadline
        self.seconds_each = seconds_each
        self.sent: list[Send] = []
        self.slept: list[float] = []

    def call(self, max_retries: int = 2) -> Call:
        return Call("host:1", until=self.until, max_retries=max_retries, clock=lambda: self.now, jitter=lambda: 0.5)

    def run(self, steps):
        outcome = None
        try:
            while True:
                step = steps.send(outcome)
                if isinstance(step, Sleep):
                    self.slept.append(step.seconds)
                    self.now += step.seconds
                    outcome = None
                else:
                    self.sent.append(step)
                    self.now += self.seconds_each
                    outcome = self.outcomes.pop(0)
        except StopIteration as finished:
            return finished.value

    def score(self, max_retries: int = 2) -> list[float]:
        steps = self.call(max_retries).score(Server((0, 32), "m"), ["q"], ["a", "b"], options=Options())
        return self.run(steps)

    def learn(self, model: str | None = None) -> Server:
        return self.run(self.call().learn(model))

    @property
    def paths(self) -> list[str]:
        return [step.request.path for step in self.sent]


class TestRetries:
    """What may pass is tried again, what can't is not."""

    def test_a_good_answer_needs_one_request(self):
        """And no waiting."""
        world = World(GOOD)
        assert world.score() == SCORES
        assert world.paths == ["/v1/score"]
        assert world.slept == []

    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
    def test_a_status_that_may_pass_is_tried_again(self, status: int):
        """Scoring has no side effects, so repeating is safe."""
        world = World(Reply(status, b"later"), GOOD)
        assert world.score() == SCORES
        assert len(world.sent) == 2

    @pytest.mark.parametrize("failure", [REFUSED, Failure("broken", "reset"), Reply(200, b"{}")])
    def test_a_broken_connection_or_reply_is_tried_again(self, failure: Reply | Failure):
        """Half a reply is no reply."""
        world = World(failure, GOOD)
        assert world.score() == SCORES

    def test_pauses_double_with_full_jitter(self):
        """Half of 0.5 and 1 s with jitter fixed at one half."""
        world = World(BUSY, BUSY, GOOD)
        world.score()
        assert world.slept == [0.25, 0.5]

    def test_tries_are_limited_and_the_error_counts_them(self):
        """Three tries with two retries; what, where, how often, and what to do."""
        world = World(REFUSED, REFUSED, REFUSED, GOOD)
        with pytest.raises(
            BackendUnavailable, match=r"can't connect: refused \(host:1, 3 attempts.*Is the vLLM server"
        ):
            world.score()
        with pytest.raises(BackendUnavailable, match="answered 503: busy.*1 attempt,"):
            World(BUSY, GOOD).score(max_retries=0)

    @pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 405, 413, 422])
    def test_a_refusal_is_final(self, status: int):
        """The same request would be refused again."""
        world = World(Reply(status, b'{"detail": "no"}'), GOOD)
        with pytest.raises(BackendRejected):
            world.score()
        assert len(world.sent) == 1

    def test_a_bad_reply_to_the_end_is_a_bad_reply(self):
        """With the place added to what is wrong with it."""
        with pytest.raises(BadReply, match=r"no list 'data' \(host:1, 3 attempts"):
            World(*[Reply(200, b"{}")] * 3).score()


class TestRetryAfter:
    """A server that says when, is asked then."""

    def test_it_is_obeyed(self):
        """Exactly."""
        world = World(Reply(429, b"", {"retry-after": "3"}), GOOD)
        world.score()
        assert world.slept == [3.0]

    def test_longer_than_the_deadline_is_not_waited_for(self):
        """The failure is told at once."""
        world = World(Reply(429, b"", {"retry-after": "3600"}), GOOD, deadline=30)
        with pytest.raises(BackendUnavailable, match="429"):
            world.score()
        assert world.slept == []

    @pytest.mark.parametrize("value", ["nan", "inf", "-5", "soon", "", "Wed, 21 Oct 2015 07:28:00 GMT"])
    def test_nonsense_is_ordinary_back_off(self, value: str):
        """No header can crash or hang the client."""
        world = World(Reply(503, b"", {"retry-after": value}), GOOD)
        world.score()
        assert world.slept == [0.25]


class TestDeadline:
    """No request and no pause goes beyond it."""

    def test_each_request_gets_what_is_left(self):
        """Of 10 s, after one that took 4 s and a pause of 0.25 s."""
        world = World(BUSY, GOOD, deadline=10, seconds_each=4)
        world.score()
        assert [step.timeout for step in world.sent] == [10, 5.75]

    def test_a_request_that_takes_all_the_time_is_a_timeout(self):
        """Saying what could help."""
        with pytest.raises(DeadlineExceeded, match="Allow more time"):
            World(Failure("timeout", "timed out"), deadline=10, seconds_each=10).score()

    def test_a_pause_that_would_pass_it_is_not_begun(self):
        """The last failure is the answer."""
        world = World(BUSY, GOOD, deadline=1, seconds_each=0.9)
        with pytest.raises(BackendUnavailable):
            world.score()
        assert world.slept == []

    def test_without_a_deadline_requests_have_no_timeout(self):
        """None means none."""
        world = World(GOOD)
        world.score()
        assert world.sent[0].timeout is None


class TestRefusals:
    """Each says what to do next."""

    @pytest.mark.parametrize(
        ("status", "body", "error", "words"),
        [
            (401, b'{"error": "Unauthorized"}', AuthError, "VLLM_API_KEY"),
            (403, b"", AuthError, "VLLM_API_KEY"),
            (307, b"", BackendRejected, "never followed"),
            (404, b'{"detail": "Not Found"}', BackendRejected, "--runner pooling"),
            (
                400,
                b'{"error": {"message": "maximum context length is 512"}}',
                BackendRejected,
                "truncate_prompt_tokens",
            ),
            (400, b'{"error": {"message": "odd"}}', BackendRejected, "answered 400: odd"),
        ],
    )
    def test_the_remedy_fits_the_status(self, status: int, body: bytes, error: type[Exception], words: str):
        """With the server's own words."""
        with pytest.raises(error, match=words):
            World(Reply(status, body)).score()

    def test_an_unknown_model_is_answered_with_those_that_are_served(self):
        """One more request finds out."""
        missing = Reply(404, b'{"error": {"message": "The model `m` does not exist."}}')
        models = Reply(200, b'{"data": [{"id": "x"}, {"id": "y"}]}')
        with pytest.raises(BackendRejected, match=r"does not serve the model 'm'.*It serves: x, y\."):
            World(missing, models).score()

    def test_an_answer_too_large_to_read_is_a_bad_reply(self):
        """It is not tried again and again."""
        with pytest.raises(BadReply, match="longer than"):
            World(*[Failure("unread", "the answer is longer than 10 bytes")] * 3).score()


class TestLearning:
    """What is asked once before the first score."""

    VERSION = Reply(200, b'{"version": "0.32.0"}')

    def test_a_named_model_is_looked_up(self):
        """Its checkpoint tells what it is."""
        world = World(self.VERSION, Reply(200, b'{"data": [{"id": "other"}, {"id": "mine", "root": "org/x"}]}'))
        assert world.learn("mine") == Server((0, 32), "mine", "org/x")
        assert world.paths == ["/version", "/v1/models"]

    @pytest.mark.parametrize("models", [Reply(404, b""), Reply(200, b'{"data": []}')])
    def test_a_named_model_needs_no_list_of_models(self, models: Reply):
        """A gateway may have none, or name models differently."""
        assert World(self.VERSION, models).learn("mine") == Server((0, 32), "mine")

    def test_an_unnamed_model_is_the_one_that_is_served(self):
        """Aliases of one checkpoint count as one; the first is asked for."""
        models = Reply(200, b'{"data": [{"id": "a", "root": "r"}, {"id": "b", "root": "r"}]}')
        world = World(self.VERSION, models)
        assert world.learn() == Server((0, 32), "a", "r")
        assert world.paths == ["/version", "/v1/models"]

    @pytest.mark.parametrize(
        ("models", "words"), [(b'{"data": [{"id":"a"},{"id":"b"}]}', "a, b"), (b'{"data":[]}', "0")]
    )
    def test_no_or_several_models_must_be_chosen_from(self, models: bytes, words: str):
        """Guessing would score with the wrong one."""
        with pytest.raises(ConfigError, match=words):
            World(self.VERSION, Reply(200, models)).learn()

    def test_a_gateway_that_hides_the_version_is_fine(self):
        """404 on /version is an answer, too."""
        models = Reply(200, b'{"data": [{"id": "m"}]}')
        assert World(Reply(404, b""), models).learn() == Server(None, "m", "m")


class TestRerankEndpoint:
    """Servers that have only a rerank API."""

    def run(self, world: World, queries: list[str], documents: list[str]) -> list[float]:
        return world.run(
            world.call().score(Server(None, "m"), queries, documents, options=Options(), endpoint="rerank")
        )

    @staticmethod
    def reply(*scores: float) -> Reply:
        results = [{"index": index, "relevance_score": score} for index, score in enumerate(scores)]
        return Reply(
            200, json.dumps({"results": sorted(results, key=lambda entry: -entry["relevance_score"])}).encode()
        )

    def test_scores_come_back_in_the_order_of_the_documents(self):
        """Though the server sorts them."""
        world = World(self.reply(0.1, 0.9, 0.5))
        assert self.run(world, ["q"], ["a", "b", "c"]) == [0.1, 0.9, 0.5]
        assert world.paths == ["/v1/rerank"]
        assert json.loads(world.sent[0].request.body) == {"model": "m", "query": "q", "documents": ["a", "b", "c"]}

    def test_many_queries_are_many_requests(self):
        """One for each run of the same query."""
        world = World(self.reply(0.1, 0.2), self.reply(0.3))
        assert self.run(world, ["q", "q", "r"], ["a", "b", "c"]) == [0.1, 0.2, 0.3]
        assert [json.loads(step.request.body)["query"] for step in world.sent] == ["q", "r"]


outcomes = st.sampled_from(
    [
        GOOD,
        REFUSED,
        BUSY,
        Failure("broken", "reset"),
        Failure("timeout", "t"),
        Failure("unread", "u"),
        Reply(200, b"{}"),
    ]
    + [Reply(status, b'{"error": {"message": "m"}}') for status in (302, 400, 401, 404, 429, 500)]
    + [Reply(429, b"", {"retry-after": value}) for value in ("0", "2", "100", "x")]
)


@given(st.lists(outcomes, min_size=12, max_size=12), st.floats(0.1, 60), st.floats(0, 5), st.integers(0, 4))
def test_every_schedule_of_faults_ends_in_the_scores_or_one_of_our_errors(
    schedule: Sequence[Reply | Failure], deadline: float, seconds_each: float, max_retries: int
):
    """Within its tries, and without a pause that outlives the deadline."""
    world = World(*schedule, deadline=deadline, seconds_each=seconds_each)
    with contextlib.suppress(RerankError):
        assert world.score(max_retries) == SCORES
    assert len(world.sent) <= 2 * (max_retries + 1)  # the request, and the list of models after a 404
    assert world.now - sum([seconds_each] * len(world.sent)) <= 100.0 + deadline
