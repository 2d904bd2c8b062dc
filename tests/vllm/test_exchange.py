"""How one request gets its answer: tries, servers, time, and what is no answer; on a virtual clock."""

import asyncio
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from rag_rerank import (
    AuthError,
    BackendRejected,
    BackendUnavailable,
    BadReply,
    DeadlineExceeded,
)
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.exchange import ID_PREFIX, Exchange, Rules, Send
from rag_rerank.vllm.servers import Servers
from rag_rerank.vllm.wire import Failure, Options, Reply, Request, ServerFacts, scoring_request
from tests.faulty_server import oracle
from tests.vllm.virtual import (
    BROKEN,
    BUSY,
    HANG,
    REFUSED,
    START,
    UNREACHABLE,
    UNREAD,
    UNTRUSTED,
    Answer,
    Outcome,
    Script,
    Server,
    World,
    after,
    always,
    at,
    refusal,
)

SCORES = [oracle("q", "a"), oracle("q", "b")]
EMPTY = Reply(200, b"{}")
ANONYMOUS = Server(ids="none")
MISSING = refusal(404, "The model `m` does not exist.")


def score(world: World) -> list[float]:
    return world.score("q", ["a", "b"])


def learn(world: World) -> ServerFacts:
    return world.run(world.exchange().describe())


def off_by(difference: float) -> Answer:
    """A server whose scores are higher by so much."""

    def answer(send: Send, now: float) -> tuple[float, Outcome]:
        content = json.loads(Server().reply(send).body)
        for entry in content.get("data", []) if send.request.body else []:
            entry["score"] += difference
        return 0.0, Reply(200, json.dumps(content).encode())

    return answer


class TestTries:
    """What may pass is tried again, what can't is not."""

    def test_a_good_answer_needs_one_request(self):
        """And no waiting."""
        world = World()
        assert score(world) == SCORES
        assert (world.paths, world.slept, world.discarded) == (["/v1/score"], [], [])

    @pytest.mark.parametrize("status", [408, 409, 424, 425, 429, 500, 502, 503, 504, 599])
    def test_a_status_that_may_pass_is_tried_again(self, status: int):
        """Scoring has no side effects, so repeating is safe."""
        world = World(Script(refusal(status)))
        assert score(world) == SCORES
        assert len(world.score_requests) == 2

    @pytest.mark.parametrize(
        "outcome", [REFUSED, BROKEN, UNREAD, EMPTY, Reply(200, b""), Reply(200, b"<html>"), Reply(204, b"")]
    )
    def test_a_broken_connection_or_reply_is_tried_again(self, outcome: Outcome):
        """Half a reply is no reply."""
        world = World(Script(outcome))
        assert score(world) == SCORES
        assert len(world.score_requests) == 2

    def test_pauses_double_up_to_8_seconds(self):
        """Half of 0.5, 1, 2 ... s without jitter."""
        world = World(Script(*[refusal(500)] * 7), max_retries=7)
        assert score(world) == SCORES
        assert world.slept == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0]

    @pytest.mark.parametrize(("jitter", "pause"), [(0.0, 0.25), (0.5, 0.375), (1.0, 0.5)])
    def test_jitter_adds_up_to_as_much(self, jitter: float, pause: float):
        """There is always some pause: three tries outlast a hiccup of 0.7 s."""
        world = World(Script(BUSY), jitter=jitter)
        assert score(world) == SCORES
        assert world.slept == [pause]

    def test_a_broken_connection_is_replaced_at_once_but_only_the_first_time(self):
        """Most often it is a kept one that the server had closed; a second one is no such accident."""
        world = World(Script(BROKEN))
        assert score(world) == SCORES
        assert world.slept == []
        world = World(Script(BROKEN, BROKEN))
        assert score(world) == SCORES
        assert world.slept == [0.5]
        world = World(Script(refusal(500), BROKEN))
        assert score(world) == SCORES
        assert world.slept == [0.25, 0.5]

    def test_tries_are_limited_and_the_error_counts_them(self):
        """Three with two retries; it says what, where, how often, how long, and what to do."""
        world = World(Script(*[BUSY] * 3, seconds=1.0))
        with pytest.raises(BackendUnavailable, match=r"^the server answered 503: busy \(server0:1, \d") as caught:
            score(world)
        error = caught.value
        # A server that failed is asked again who it is: that was the second and third request.
        assert (error.endpoint, error.attempts, error.elapsed) == ("server0:1", 3, 3.75)
        assert len(world.sent) == 3

    def test_without_retries_there_is_one_try(self):
        """max_retries=0."""
        world = World(Script(BUSY), max_retries=0)
        with pytest.raises(BackendUnavailable, match=r"503: busy \(server0:1, 1 attempt, 0.00 s\)\.$"):
            score(world)
        assert len(world.sent) == 1

    def test_no_connection_asks_whether_there_is_a_server(self):
        """With the HTTP library's exception as the cause."""
        cause = OSError("refused")
        world = World(always(replace(REFUSED, cause=cause)))
        with pytest.raises(BackendUnavailable, match=r"can't connect: refused.*3 attempts.*Is the vLLM") as caught:
            score(world)
        assert caught.value.__cause__ is cause

    def test_no_connection_takes_three_connect_timeouts_and_two_pauses(self):
        """Row 3: 3 x 2 s and at most 1.5 s."""
        world = World(always(*reversed(UNREACHABLE)), jitter=0.999)
        with pytest.raises(BackendUnavailable, match="can't connect: timed out"):
            score(world)
        assert 6.0 < world.elapsed < 7.5

    def test_a_certificate_is_not_tried_again(self):
        """It will be the same, and nothing insecure is done instead."""
        world = World(always(UNTRUSTED))
        with pytest.raises(BackendUnavailable, match=r"can't trust the server: expired.*SSL_CERT_FILE"):
            score(world)
        assert (len(world.sent), world.slept) == (1, [])

    def test_a_bad_reply_to_the_end_is_a_bad_reply(self):
        """With the place added to what is wrong with it; its connections are not used again."""
        world = World(Script(*[EMPTY] * 3))
        with pytest.raises(
            BadReply, match=r"no list 'data': {} \(server0:1, 3 attempts.*Is it a vLLM server\?$"
        ) as caught:
            score(world)
        assert isinstance(caught.value.__cause__, BadReply)
        assert world.discarded == [EMPTY] * 3

    def test_an_answer_that_is_not_read_is_a_bad_reply(self):
        """Too large, or compressed: the transport has closed the connection itself."""
        world = World(always(UNREAD))
        with pytest.raises(BadReply, match=r"longer than 10 bytes \(server0:1, 3 attempts") as caught:
            score(world)
        assert caught.value.whole
        assert world.discarded == []

    def test_the_attempts_of_the_whole_call_are_counted(self):
        """Those of the other requests, too."""
        world = World(Script(None, None, None, *[refusal(500)] * 3), known=False, chunk_size=1, max_concurrency=1)
        with pytest.raises(BackendUnavailable, match="6 attempts"):
            score(world)


class TestRefusals:
    """Final, and each says what to do next."""

    @pytest.mark.parametrize("status", [100, 301, 302, 307, 308, 400, 401, 402, 403, 404, 405, 413, 422, 501, 505])
    def test_a_refusal_is_final(self, status: int):
        """The same request would be refused again."""
        world = World(always(refusal(status)))
        exchange = world.exchange()
        with pytest.raises(BackendRejected):
            world.run(exchange.ask(lambda server, request_id: _request(), lambda body: pytest.fail("no answer")))
        assert world.slept == []
        assert len(world.score_requests) == 1

    @pytest.mark.parametrize(
        ("reply", "kind", "words"),
        [
            (Reply(401, b'{"error": "Unauthorized"}'), AuthError, "401: Unauthorized .*VLLM_API_KEY"),
            (Reply(403, b""), AuthError, "VLLM_API_KEY"),
            (Reply(307, b"", {"location": "http://x"}), BackendRejected, "307, a redirect, which is never followed"),
            (Reply(300, b""), BackendRejected, "never followed.*base_url"),
            (Reply(399, b""), BackendRejected, "never followed.*base_url"),
            (Reply(404, b'{"detail": "Not Found"}'), BackendRejected, "404: Not Found .*--runner pooling"),
            (refusal(400, "maximum context length is 512"), BackendRejected, "max_tokens_per_doc="),
            (refusal(400, "odd"), BackendRejected, r"answered 400: odd \(server0:1, 1 attempt, 0.00 s\)\.$"),
        ],
    )
    def test_the_remedy_fits_the_status(self, reply: Reply, kind: type[BackendRejected], words: str):
        """With the server's own words, and the status to look at."""
        world = World(always(reply))
        with pytest.raises(kind, match=words) as caught:
            world.run(world.exchange().ask(lambda server, request_id: _request(), lambda body: pytest.fail("none")))
        assert type(caught.value) is kind
        assert caught.value.status == reply.status

    def test_an_unknown_model_is_answered_with_those_that_are_served(self):
        """One more request finds out."""
        world = World(Server(models=["x", "y"]), model="m")
        with pytest.raises(BackendRejected, match=r"serve the model 'm' .*It serves: x, y\. Pass one") as caught:
            score(world)
        assert world.paths == ["/v1/score", "/v1/models"]
        assert type(caught.value) is BackendRejected
        assert caught.value.status == 404

    @pytest.mark.parametrize("answer", [Reply(404, b'{"detail": "Not Found"}'), MISSING, Reply(405, b"")])
    def test_an_unknown_model_is_named_where_models_are_not_listed(self, answer: Reply):
        """A gateway may have no list: that says nothing about its score API."""
        world = World(Script(MISSING, answer), model="m")
        with pytest.raises(BackendRejected, match="the server does not serve the model 'm'") as caught:
            score(world)
        assert type(caught.value) is BackendRejected
        assert "--runner pooling" not in str(caught.value)

    def test_a_list_that_fails_is_done_without(self):
        """What is said is said of the model."""
        world = World(
            lambda send, now: (0.0, refusal(500) if send.request.body is None else MISSING), model="m", max_retries=0
        )
        with pytest.raises(BackendRejected, match="does not serve the model 'm'.*Pass the name"):
            score(world)

    def test_a_model_that_is_listed_is_not_missing(self):
        """Some programs say so of a path that they don't have."""
        world = World(Script(refusal(404, "Invalid URL")), model="m")
        with pytest.raises(BackendRejected, match=r'404: Invalid URL .*endpoint="auto"') as caught:
            score(world)
        assert caught.value.whole
        assert world.paths == ["/v1/score", "/v1/models"]


@pytest.fixture
def in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


class TestRetryAfter:
    """A server that says when, is asked then."""

    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            ("3", 3.0),
            ("120", 120.0),
            ("0.5", 0.5),
            (" 3 ", 3.0),
            ("Sat, 21 Nov 2026 22:27:40 GMT", 60.0),
            ("Saturday, 21-Nov-26 22:27:40 GMT", 60.0),
            ("Sat Nov 21 22:27:40 2026", 60.0),
            ("Sat, 21 Nov 2026 22:27:40 -0000", 60.0),
            ("Sat, 21 Nov 2026 23:27:40 +0100", 60.0),
        ],
    )
    @pytest.mark.parametrize("status", [429, 503])
    @pytest.mark.usefixtures("in_tokyo")
    def test_it_is_obeyed_exactly(self, status: int, value: str, seconds: float):
        """Seconds, and dates in the three forms of RFC 9110, wherever the caller is."""
        world = World(Script(refusal(status, retry_after=value)), deadline=200)
        assert score(world) == SCORES
        assert world.slept == [seconds]

    @pytest.mark.parametrize("value", ["0", "Sat, 21 Nov 2026 22:26:40 GMT"])
    def test_now_is_ordinary_back_off(self, value: str):
        """Three tries at once would meet the same."""
        world = World(Script(refusal(503, retry_after=value)))
        assert score(world) == SCORES
        assert world.slept == [0.25]

    @pytest.mark.parametrize("value", ["121", "3600", "604800", "Sun, 22 Nov 2026 22:26:40 GMT"])
    def test_more_than_two_minutes_are_told_to_the_caller_at_once(self, value: str):
        """Row 13: no further request, and the error has the seconds."""
        world = World(always(refusal(429, retry_after=value)))
        with pytest.raises(BackendUnavailable, match="429") as caught:
            score(world)
        assert (len(world.sent), world.slept) == (1, [])
        assert caught.value.retry_after == (86400.0 if "Nov" in value else float(value))

    @pytest.mark.parametrize("value", ["10", "10.5", "100", "Sat, 21 Nov 2026 22:26:51 GMT"])
    def test_longer_than_the_deadline_is_not_waited_for(self, value: str):
        """The failure is told at once."""
        world = World(Script(refusal(429, retry_after=value)), deadline=10)
        with pytest.raises(BackendUnavailable, match="429") as caught:
            score(world)
        assert (len(world.sent), world.slept, world.elapsed) == (1, [], 0)
        assert caught.value.retry_after >= 10

    @pytest.mark.parametrize(
        "value",
        [
            "nan",
            "inf",
            "-inf",
            "-5",
            "-0.1",
            "1e35",
            "1" + "0" * 35,
            "9" * 5000,
            str(366 * 86400),
            "soon",
            "",
            " ",
            ",",
            "3 s",
            "3;4",
            "0x10",
            "٣,",
            "Wed, 21 Oct 2015 07:28:00 GMT",
            "Sat, 21 Nov 2026 22:26:39 GMT",
            "Sat, 99 Nov 2026 22:26:39 GMT",
            "Sat, 21 Nov 2026 99:99:99 GMT",
            "Sat, 21 Nov 100000 07:28:00 GMT",
            "Sat, 21 Nov 9999 07:28:00 GMT",
            "Sat, 21 Nov 0001 07:28:00 GMT",
            "Sat, 21 Nov 2026 22:27:40 +999999999",
            "Fri, 31 Dec 9999 23:59:59 -2359",
        ],
    )
    def test_nonsense_is_ordinary_back_off(self, value: str):
        """Row 14: no header can crash or hang the client."""
        world = World(Script(refusal(503, retry_after=value)))
        assert score(world) == SCORES
        assert world.slept == [0.25]

    def test_the_error_has_none_where_the_server_did_not_ask(self):
        """Nor where what it asked makes no sense."""
        for headers in ({}, {"retry_after": "soon"}):
            with pytest.raises(BackendUnavailable) as caught:
                score(World(always(refusal(503, **headers))))
            assert caught.value.retry_after is None

    def test_statuses_that_are_final_do_not_become_otherwise_by_it(self):
        """A 400 with Retry-After is a 400."""
        world = World(always(refusal(401, retry_after="1")))
        with pytest.raises(AuthError):
            score(world)
        assert len(world.sent) == 1

    def test_it_is_not_waited_for_where_another_server_answers(self):
        """Which was not asked to wait."""
        world = World(at(always(refusal(429, retry_after="3600")), Server()), servers=2)
        assert score(world) == SCORES
        assert (world.hosts, world.slept) == ([0, 1], [])

    def test_a_server_is_left_alone_for_as_long_as_it_asked_also_when_another_one_fails(self):
        """What the other one says is not for the first."""
        world = World(at(Script(refusal(429, retry_after="5")), Script(refusal(500))), servers=2, deadline=30)
        assert score(world) == SCORES
        asked_again = [sent.at for sent, host in zip(world.sent, world.hosts, strict=True) if host == 0][1:]
        assert all(moment >= 5 for moment in asked_again)


class TestDeadline:
    """No request and no pause goes beyond it."""

    def test_each_request_gets_what_is_left(self):
        """Of 10 s, after one that took 4 s and a pause of 0.25 s."""
        world = World(Script((4.0, refusal(500))), deadline=10)
        assert score(world) == SCORES
        assert [sent.send.timeout for sent in world.sent] == [10, 5.75]

    def test_connecting_may_not_take_longer_than_what_is_left(self):
        """Of 4 s, after 3 s and a pause of 0.25 s."""
        world = World(Script((3.0, refusal(500))), deadline=4)
        assert score(world) == SCORES
        assert [sent.send.connect_timeout for sent in world.sent] == [2.0, 0.75]

    def test_a_request_that_takes_all_the_time_is_a_timeout(self):
        """Saying what could help, at that moment; and nothing is held against the server."""
        cause = TimeoutError()
        world = World(Script(HANG), deadline=10)
        with pytest.raises(DeadlineExceeded, match=r"had not answered .*server0:1, 1 attempt, 10.00 s.*Allow more"):
            score(world)
        assert world.elapsed == 10
        assert world.each_server[0].back_off.rest_ends == -math.inf
        with pytest.raises(DeadlineExceeded) as caught:
            score(World(Script((10.0, Failure("timeout", "timed out", cause))), deadline=10))
        assert caught.value.__cause__ is cause

    def test_a_connection_that_fails_at_the_last_moment_is_a_timeout(self):
        """Less than a millisecond is left: nothing could be done with it."""
        with pytest.raises(DeadlineExceeded):
            score(World(Script((1.9995, REFUSED)), deadline=2))
        with pytest.raises(BackendUnavailable, match="refused"):
            score(World(Script((1.998, REFUSED)), deadline=2))
        assert score(World(Script((1.5, REFUSED)), deadline=2)) == SCORES

    def test_a_pause_that_would_pass_it_is_not_begun(self):
        """The last failure is the answer."""
        world = World(Script((0.9, refusal(500))), deadline=1)
        with pytest.raises(BackendUnavailable, match="500"):
            score(world)
        assert world.slept == []
        assert world.elapsed == pytest.approx(0.9)

    def test_a_failure_at_the_deadline_is_not_tried_again(self):
        """Not even where it would be tried at once."""
        world = World(Script((1.0, refusal(500))), servers=2, deadline=1, attempt_timeout=1.0)
        with pytest.raises(BackendUnavailable, match="500"):
            score(world)
        assert len(world.sent) == 1

    def test_no_request_is_sent_after_it(self):
        """The second answer of three comes at the last moment."""
        world = World(Server(seconds=0.5), deadline=1, chunk_size=1, max_concurrency=1)
        with pytest.raises(DeadlineExceeded, match=r"^the deadline passed \(server0:1, 2 attempts, 1.00 s\)"):
            world.score("q", ["a", "b", "c"])
        assert len(world.sent) == 2

    def test_an_answer_at_the_deadline_is_an_answer(self):
        """It is there."""
        world = World(Server(seconds=1.0), deadline=1)
        assert score(world) == SCORES

    def test_without_a_deadline_requests_have_no_timeout(self):
        """None means none; connecting has its own."""
        world = World()
        score(world)
        assert (world.sent[0].send.timeout, world.sent[0].send.connect_timeout) == (None, 2.0)

    @pytest.mark.parametrize("deadline", [0.0, -1.0])
    def test_a_call_that_begins_too_late_sends_nothing(self, deadline: float):
        """Whatever the number of servers."""
        for servers in (1, 2):
            world = World(servers=servers, deadline=deadline)
            with pytest.raises(DeadlineExceeded):
                score(world)
            assert world.sent == []


class TestAttemptTimeout:
    """A request that takes too long is given up while there is time for another."""

    def test_one_server_has_all_of_the_calls_time(self):
        """Nobody else could be asked."""
        world = World(deadline=30)
        score(world)
        assert world.sent[0].send.timeout == 30

    def test_a_server_that_is_silent_for_a_third_of_the_time_is_not_waited_for_alone(self):
        """The next one is asked as well; the first answer counts, and the other request is given up."""
        world = World(at(always(*reversed(HANG)), Server(seconds=1.0)), servers=2, deadline=30)
        assert score(world) == SCORES
        assert [sent.send.timeout for sent in world.sent] == [30, 20]
        assert (world.hosts, world.elapsed) == ([0, 1], 11)
        assert world.each_server[0].back_off.rest_ends == START + 11

    @pytest.mark.parametrize(
        "other", [always(refusal(503)), always(REFUSED), always(*reversed(HANG)), Server(seconds=15)]
    )
    def test_what_one_server_alone_would_answer_several_answer(self, other: Answer):
        """It takes most of the time: whatever the others do meanwhile, it is waited for."""
        world = World(at(Server(seconds=28.0), other), servers=2, deadline=30)
        assert score(world) == SCORES

    def test_a_failure_while_another_server_is_silent_is_tried_again(self):
        """By the ordinary rules."""
        world = World(at(always(*reversed(HANG)), Script(BUSY)), servers=2, deadline=30)
        assert score(world) == SCORES
        assert (world.hosts, round(world.elapsed, 6)) == ([0, 1, 1], 10.51)

    def test_a_refusal_ends_the_silent_ones_too(self):
        """It is an answer."""
        world = World(at(always(*reversed(HANG)), always(refusal(401))), servers=2, deadline=30)
        with pytest.raises(AuthError):
            score(world)
        assert world.elapsed == 10

    def test_work_that_waits_its_turn_is_not_sent_twice(self):
        """18 calls at once, two servers that do one request in 0.5 s: the last ones are answered after 4.5 s."""
        free = [START, START]

        def one_at_a_time(send: Send, now: float) -> tuple[float, Outcome]:
            number = int(send.endpoint.label[6])
            free[number] = max(free[number], now) + 0.5
            return free[number] - now, Server().reply(send)

        world = World(one_at_a_time, servers=2, deadline=6)
        assert world.at_once(18) == [SCORES] * 18
        assert len(world.sent) == 18

    def test_a_request_that_later_ones_overtake_is_lost(self):
        """Its server works, but has forgotten it."""
        world = World(
            at(Script((math.inf, BROKEN), server=Server(seconds=0.1)), Server(seconds=0.1)), servers=2, deadline=30
        )

        async def calls() -> list[list[float]]:
            first = asyncio.create_task(world.call("q", ["a", "b"]))
            for _ in range(90):
                await asyncio.sleep(0.1)
                assert await world.call("q", ["a", "b"]) == SCORES
            return await first

        assert world.run(calls()) == SCORES
        assert 10 < world.elapsed < 21

    def test_all_hanging_servers_end_in_a_timeout_at_the_deadline(self):
        """Each asked once, and both waited for."""
        world = World(always(*reversed(HANG)), servers=2, deadline=30)
        with pytest.raises(DeadlineExceeded):
            score(world)
        assert world.elapsed == 30
        assert world.hosts == [0, 1]

    def test_several_servers_without_a_deadline_have_no_share(self):
        """Of nothing."""
        world = World(servers=2)
        score(world)
        assert world.sent[0].send.timeout is None

    @pytest.mark.parametrize("servers", [1, 2])
    def test_a_given_one_holds_for_any_number_of_servers(self, servers: int):
        """It ends a try, and the next may work."""
        world = World(Script(HANG), servers=servers, deadline=30, attempt_timeout=5.0, known=True)
        assert score(world) == SCORES
        assert {sent.send.timeout for sent in world.sent} == {5.0}
        assert world.slept == ([0.25] if servers == 1 else [])

    def test_it_is_told_how_long_was_waited(self):
        """And which setting it was."""
        world = World(always(*reversed(HANG)), attempt_timeout=5.0)
        with pytest.raises(BackendUnavailable, match=r"no answer within 5 s .*3 attempts, 15.75 s.*attempt_timeout="):
            score(world)

    def test_connecting_may_not_take_longer(self):
        """Where the try is shorter than connect_timeout."""
        world = World(attempt_timeout=0.5)
        score(world)
        assert world.sent[0].send.connect_timeout == 0.5


class TestSeveralServers:
    """Asked in turn; those that do not answer rest."""

    def test_requests_go_round(self):
        """Each gets as much as the others."""
        world = World(servers=3)
        for _ in range(6):
            assert score(world) == SCORES
        assert world.hosts == [0, 1, 2, 0, 1, 2]

    @pytest.mark.parametrize("outcome", [REFUSED, BROKEN, UNREAD, UNTRUSTED, EMPTY, BUSY, refusal(500), refusal(429)])
    def test_another_one_is_asked_at_once(self, outcome: Outcome):
        """No pause: it has not failed."""
        world = World(at(always(outcome), Server()), servers=2)
        assert score(world) == SCORES
        assert (world.hosts, world.slept) == ([0, 1], [])

    def test_all_are_tried_before_there_is_a_pause(self):
        """The third try of two servers comes after one of 1 s, halved by jitter."""
        world = World(always(refusal(500)), servers=2)
        with pytest.raises(BackendUnavailable, match="server0:1, 3 attempts"):
            score(world)
        assert (world.hosts, world.slept) == ([0, 1, 0], [0.5])

    def test_the_error_names_the_server_that_failed_last(self):
        """Not all of them."""
        world = World(always(refusal(500)), servers=2, max_retries=1)
        with pytest.raises(BackendUnavailable, match="server1:1, 2 attempts") as caught:
            score(world)
        assert caught.value.endpoint == "server1:1"

    def test_what_one_server_refuses_no_other_is_asked(self):
        """They serve the same model, alike."""
        world = World(at(always(refusal(405)), Server()), servers=2)
        with pytest.raises(BackendRejected):
            score(world)
        assert world.hosts == [0]

    @pytest.mark.parametrize("outcome", [REFUSED, BROKEN, UNTRUSTED, refusal(502), BUSY, refusal(504)])
    def test_one_that_does_not_answer_rests(self, outcome: Outcome):
        """For 1 s, twice as long after each failure; it costs one try per rest."""
        world = World(at(always(outcome), Server()), servers=2)
        asked_at = []
        for moment in range(80):
            world.now = START + moment / 10
            before = len(world.sent)
            assert score(world) == SCORES
            asked_at += [moment / 10] * (0 in world.hosts[before:])
        assert len(asked_at) == 4
        assert sum(sent.send.endpoint.label == "server0:1" for sent in world.score_requests) <= 4
        assert all(later - earlier >= 2**n for n, (earlier, later) in enumerate(itertools.pairwise(asked_at)))

    def test_one_that_hangs_rests(self):
        """A time-out is no answer."""
        world = World(at(always(*reversed(HANG)), Server()), servers=2, deadline=3)
        assert score(world) == SCORES
        assert world.each_server[0].back_off.resting

    @pytest.mark.parametrize("outcome", [refusal(500), refusal(599), EMPTY, UNREAD])
    def test_one_that_fails_at_what_another_one_does_rests(self, outcome: Outcome):
        """Then it was not the request's fault."""
        world = World(at(always(outcome), Server()), servers=2)
        for _ in range(40):
            assert score(world) == SCORES
        assert world.hosts.count(0) == 1

    def test_none_rests_where_all_fail_at_a_request(self):
        """It is the request that can't be answered."""
        world = World(always(refusal(500)), servers=2)
        with pytest.raises(BackendUnavailable):
            score(world)
        assert [server.back_off.resting for server in world.each_server] == [False, False]

    def test_one_that_asks_to_be_left_alone_is_left_alone_by_all_calls(self):
        """For as long as it asked, but not for longer than two minutes."""
        for asked, rest in ((5.0, 5), (3600.0, 120)):
            world = World(at(always(refusal(429, retry_after=str(asked))), Server()), servers=2)
            for _ in range(9):
                assert score(world) == SCORES
            assert world.hosts.count(0) == 1
            assert world.each_server[0].back_off.rest_ends == START + rest

    def test_concurrent_failures_are_one(self):
        """24 requests at once, all refused: the server rests for 1 s."""
        world = World(at(always(BUSY, 0.5), Server()), servers=2)
        assert world.at_once(24) == [SCORES] * 24
        assert world.each_server[0].back_off.rest_ends == START + 1.5

    def test_each_server_is_asked_however_few_retries_there_are(self):
        """Another server is no retry."""
        world = World(at(always(REFUSED), always(BUSY), always(refusal(500)), Server()), servers=4, max_retries=0)
        assert score(world) == SCORES
        assert world.hosts == [0, 1, 2, 3]

    def test_a_short_outage_fails_no_call(self):
        """24 calls, 10 ms apart, while a server says 503 for a quarter of a second."""
        world = World(after(0.25, Server(), always(BUSY)))

        async def calls() -> list[list[float]]:
            tasks = []
            for _ in range(24):
                tasks.append(asyncio.create_task(world.call("q", ["a", "b"])))
                await asyncio.sleep(0.01)
            return await asyncio.gather(*tasks)

        assert world.run(calls()) == [SCORES] * 24

    @pytest.mark.parametrize("outcome", [refusal(429), refusal(408)])
    def test_one_that_has_too_much_to_do_does_not_rest(self, outcome: Outcome):
        """It is there; others' requests are answered."""
        world = World(at(Script(outcome), Server()), servers=2)
        assert score(world) == SCORES
        assert not world.each_server[0].back_off.resting
        assert score(world) == SCORES
        assert world.hosts == [0, 1, 0]

    @pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 405, 413, 422])
    def test_one_that_refuses_is_not_taken_for_dead(self, status: int):
        """Row 48: the request was wrong, not the server; former failures are forgotten."""
        world = World(always(refusal(status)), servers=2)
        back_off = world.each_server[0].back_off
        back_off.failed()
        world.now += 1.5
        with pytest.raises(BackendRejected):
            score(world)
        assert world.hosts[0] == 0
        assert (back_off.rest_ends, back_off.resting) == (-math.inf, False)

    def test_one_that_works_again_is_asked_like_the_others(self):
        """After its rest, by one caller, and then by all."""
        world = World(at(after(1.5, Server(), always(REFUSED)), Server()), servers=2)
        assert score(world) == SCORES
        world.now = START + 2
        for _ in range(4):
            assert score(world) == SCORES
        assert world.hosts[2:].count(0) >= 2
        assert world.each_server[0].back_off.rest_ends == -math.inf

    def test_only_one_request_tries_a_server_after_its_rest(self):
        """Were it still hanging, all of them would."""
        world = World(at(after(1.5, Server(seconds=3.0), always(REFUSED)), Server()), servers=2, chunk_size=1)
        assert score(world) == SCORES
        begun = len(world.sent)
        world.now = START + 2
        assert world.score("q", list("abcdefgh")) == [oracle("q", document) for document in "abcdefgh"]
        first_moment = [host for sent, host in zip(world.sent, world.hosts, strict=True) if sent.at == 2]
        assert first_moment.count(0) == 1
        assert len(world.sent) > begun

    def test_where_all_rest_the_one_is_asked_whose_rest_ends_first(self):
        """It may be up again, and there is nobody else."""
        world = World(always(REFUSED), servers=3, max_retries=0)
        for number in (1, 2, 0):
            world.each_server[number].back_off.failed()
            world.now += 0.1
        with pytest.raises(BackendUnavailable):
            score(world)
        assert world.hosts == [1]

    def test_where_all_rest_each_is_asked_before_one_is_asked_again(self):
        """With pauses, for nobody is known to answer."""
        world = World(always(REFUSED), servers=3)
        for server in world.each_server:
            server.back_off.failed()
        with pytest.raises(BackendUnavailable):
            score(world)
        assert sorted(world.hosts) == [0, 1, 2]
        assert world.slept == [0.25, 0.5]

    def test_a_server_that_answered_badly_is_preferred_to_one_that_rests(self):
        """It is there at least."""
        world = World(at(Script(refusal(500)), Server()), servers=2)
        world.each_server[1].back_off.failed()
        assert score(world) == SCORES
        assert (world.hosts, world.slept) == ([0, 0], [0.25])

    def test_servers_that_are_all_down_get_one_try(self):
        """Row 51: three failures in a row each; then a call costs one request, without a pause."""
        world = World(always(REFUSED))
        with pytest.raises(BackendUnavailable):
            score(world)
        assert len(world.sent) == 3
        for _ in range(10):
            with pytest.raises(BackendUnavailable, match="server0:1, 1 attempt,"):
                score(world)
        assert len(world.sent) == 13
        assert world.slept == [0.25, 0.5]

    def test_where_all_are_down_each_is_tried_once(self):
        """One of them may be up again."""
        for up in (0, 1):
            world = World(always(REFUSED), servers=2, max_retries=5)
            with pytest.raises(BackendUnavailable):
                score(world)
            assert world.servers.down
            world.answer = at(*(Server() if number == up else always(REFUSED) for number in range(2)))
            assert score(world) == SCORES

    def test_servers_that_are_down_get_all_tries_again_once_one_has_answered(self):
        """The count begins anew."""
        world = World(Script(*[REFUSED] * 3))
        with pytest.raises(BackendUnavailable):
            score(world)
        assert world.servers.down
        assert score(world) == SCORES
        assert not world.servers.down

    def test_single_failures_make_no_server_down(self):
        """However many there are at once (a quarter of a second of 503, 24 callers): each call has tries left."""
        world = World(servers=2)
        for server in world.each_server:
            for _ in range(24):
                server.back_off.failed()
        assert not world.servers.down
        assert score(world) == SCORES

    @pytest.mark.parametrize("outcome", [REFUSED, BUSY, refusal(500), EMPTY, Reply(200, b"<html>")])
    def test_one_that_has_failed_in_all_tries_gets_one_until_it_answers(self, outcome: Outcome):
        """Whatever the failure was; a refusal is an answer."""
        world = World(always(outcome))
        for attempts in (3, 1, 1):
            before = len(world.sent)
            with pytest.raises((BackendUnavailable, BadReply)):
                score(world)
            assert len(world.score_requests) - before == attempts or len(world.sent) - before == attempts
        world.answer = always(refusal(401))
        with pytest.raises(AuthError):
            score(world)
        assert not world.servers.down

    def test_certificates_of_all_servers_are_tried_once(self):
        """Row 4, for two."""
        world = World(always(UNTRUSTED), servers=2)
        with pytest.raises(BackendUnavailable, match="SSL_CERT_FILE"):
            score(world)
        assert (world.hosts, world.slept) == ([0, 1], [])

    def test_of_new_servers_nothing_is_known_and_nothing_is_held_against_them(self):
        """Their rests go by the monotonic clock."""
        servers = Servers([Endpoint.parse("http://a:1"), Endpoint.parse("http://b:1")])
        assert (len(servers), servers.facts, servers.down, servers.label) == (2, None, False, "a:1, b:1")
        first = servers.choose([])
        assert not first.echoes_ids
        first.failed(before := time.monotonic())
        assert before + 1.0 <= first.back_off.rest_ends <= time.monotonic() + 1.0
        assert servers.others_answer([])
        assert not servers.others_answer([servers.choose([first])])

    def test_errors_of_a_whole_call_name_all_servers(self):
        """No single one is to blame."""
        world = World(servers=2)
        error = world.exchange().error(BackendRejected, "no")
        assert error.endpoint == world.servers.label == "server0:1, server1:1"
        assert len(world.servers) == 2


class TestIdentity:
    """An answer counts only if it is the one to this request, by the model that gave the call's other answers."""

    def test_ids_are_new_for_each_try_and_go_with_the_request(self):
        """In the header, and in the body for gateways that replace the header."""
        world = World(Script(refusal(500)))
        score(world)
        ids = [sent.send.request.id for sent in world.sent]
        assert len(set(ids)) == 2
        assert [sent.content["request_id"] for sent in world.sent] == ids

    def test_ids_are_random_and_ours(self):
        """Two processes make different ones."""
        servers = Servers([World().each_server[0].endpoint])
        exchanges = [Exchange(World().send, servers, Rules(), until=None) for _ in range(2)]
        ids = [exchange.new_id() for exchange in exchanges]
        assert ids[0] != ids[1]
        assert all(name.startswith(ID_PREFIX) and len(name) == len(ID_PREFIX) + 32 for name in ids)

    @pytest.mark.parametrize("seen", [True, False])
    def test_the_answer_to_another_request_of_ours_is_refused(self, seen: bool):
        """Row 34: whether or not the server was seen to echo ids; the connection is closed, the next try is exact."""
        stale = _scores(0.1, 0.2, id=f"score-{ID_PREFIX}0")
        world = World(Script(*[None] * seen, stale))
        for _ in range(1 + seen):
            assert score(world) == SCORES
        assert world.discarded == [stale]

    def test_a_server_that_echoed_once_must_go_on(self):
        """An answer without an id, or with an own one, is not the server's."""
        for spoilt in (_scores(0.1, 0.2), _scores(0.1, 0.2, id="x"), _scores(0.1, 0.2, id=7)):
            world = World(Script(None, spoilt))
            assert score(world) == score(world) == SCORES
            assert world.discarded == [spoilt]

    @pytest.mark.parametrize("ids", ["own", "none"])
    def test_a_gateway_that_never_echoes_is_taken_at_its_word(self, ids: str):
        """Nothing better can be had."""
        world = World(Server(ids=ids))
        assert score(world) == score(world) == SCORES
        assert (len(world.sent), world.discarded) == (2, [])

    def test_each_server_is_judged_by_itself(self):
        """One echoes, the other does not."""
        world = World(at(Server(), Server(ids="own")), servers=2)
        for _ in range(4):
            assert score(world) == SCORES
        assert [server.echoes_ids for server in world.each_server] == [True, False]
        assert world.discarded == []

    def test_a_server_that_failed_may_come_back_as_another(self):
        """One that does not echo; a server that fails is also asked again who it is."""
        world = World()
        assert score(world) == SCORES
        assert world.each_server[0].echoes_ids
        world.answer = Script(REFUSED, server=Server(ids="own"))
        assert score(world) == SCORES
        assert world.paths == ["/v1/score"] * 2 + ["/version", "/v1/models", "/v1/score"]

    @pytest.mark.parametrize("outcome", [REFUSED, BROKEN, refusal(502)])
    def test_a_server_that_was_gone_while_others_answered_is_asked_again_who_it_is(self, outcome: Outcome):
        """Only that one. It may be back, with another model of that name, before anybody finds nobody there."""
        world = World(at(Script(None, outcome), Server()), servers=2)
        for _ in range(3):
            assert score(world) == SCORES
        assert [server.facts is None for server in world.each_server] == [True, False]
        world.now += 2
        assert score(world) == score(world) == SCORES
        gets = [(host, path) for host, path in zip(world.hosts, world.paths, strict=True) if path != "/v1/score"]
        assert gets == [(0, "/version"), (0, "/v1/models")]

    @pytest.mark.parametrize("outcome", [refusal(500), refusal(429), BUSY, EMPTY, UNREAD, BROKEN, (9.0, BROKEN)])
    def test_a_server_that_only_stumbled_is_not_asked_again_who_it_is(self, outcome: Outcome):
        """It has not been gone; an id is still expected back."""
        world = World(Script(None, outcome), attempt_timeout=5.0)
        assert score(world) == score(world) == SCORES
        assert world.paths == ["/v1/score"] * 3
        assert world.each_server[0].echoes_ids

    def test_answers_by_different_models_are_not_mixed(self):
        """Row 35: what the first one says decides, the others are refused."""
        other = _scores(0.5, model="other")
        world = World(Script(None, other, other, other, server=ANONYMOUS), chunk_size=1, max_concurrency=1)
        with pytest.raises(BadReply, match=r"parts of one call were answered by 'm' and by 'other'.*4 attempts"):
            score(world)
        assert world.discarded == [other] * 3

    def test_a_models_name_is_not_shown_without_end(self):
        """Whatever a server says of itself."""
        world = World(Script(None, server=always(_scores(0.5, model="x" * 60_000))), chunk_size=1, max_concurrency=1)
        world.answer = Script(_scores(0.5, model="y"), server=world.answer)
        with pytest.raises(BadReply, match="parts of one call") as caught:
            score(world)
        assert len(str(caught.value)) < 1000

    def test_another_model_once_is_tried_again(self):
        """In a rolling update, say."""
        other = _scores(0.5, model="other")
        world = World(Script(None, other, server=ANONYMOUS), chunk_size=1, max_concurrency=1)
        assert score(world) == SCORES
        assert world.discarded == [other]

    def test_models_may_differ_between_calls(self):
        """A server may be replaced."""
        world = World(Script(_scores(0.5, 0.25, model="other"), None))
        assert score(world) == [0.5, 0.25]
        assert score(world) == SCORES

    def test_answers_that_name_no_model_are_all_alike(self):
        """Some gateways don't say."""
        world = World(Script(_scores(0.5), _scores(0.25)), chunk_size=1, max_concurrency=1)
        assert score(world) == [0.5, 0.25]


def _request() -> Request:
    return scoring_request(ServerFacts((0, 32), "m"), ["q"], ["a"], Options(), "id")


def _scores(*scores: float, **fields: object) -> Reply:
    data = [{"index": index, "score": score} for index, score in enumerate(scores)]
    return Reply(200, json.dumps({"data": data, **fields}).encode())
