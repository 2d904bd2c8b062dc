"""Random schedules of faults on a virtual clock: whatever comes in whatever order, a call ends right and in time."""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rag_rerank import ConfigError, DeadlineExceeded, DocumentRejected, RerankError
from rag_rerank.vllm.exchange import ID_PREFIX, Send
from rag_rerank.vllm.wire import Failure, Reply
from tests.faulty_server import oracle
from tests.vllm.virtual import (
    BROKEN,
    HANG,
    REFUSED,
    UNREACHABLE,
    UNREAD,
    UNTRUSTED,
    Outcome,
    Server,
    World,
    refusal,
)

WRONG = 0.5

Fault = Callable[[Send, Server], Outcome | tuple[float, Outcome]]


def plain(*outcomes: Outcome | tuple[float, Outcome]) -> list[Fault]:
    """Faults that are the same for any request."""
    return [lambda send, server, outcome=outcome: outcome for outcome in outcomes]


def spoilt(spoil: Callable[[dict[str, Any]], None]) -> Fault:
    """The right answer, spoilt if it has scores."""

    def answer(send: Send, server: Server) -> Reply:
        reply = server.reply(send)
        if send.request.body is None or reply.status != 200:
            return reply
        content = json.loads(reply.body)
        spoil(content)
        return Reply(200, json.dumps(content).encode())

    return answer


def entries(content: dict[str, Any]) -> list[dict[str, Any]]:
    return content.get("data") or content["results"]


def wrong(content: dict[str, Any], **fields: str) -> None:
    """Scores that nothing but these fields tells from right ones."""
    content |= fields
    for entry in entries(content):
        entry |= {"score": WRONG, "relevance_score": WRONG}


(LATE,) = plain(HANG)
NO_NUMBER = spoilt(lambda content: entries(content)[-1].update(score=math.nan, relevance_score=None))
PASSING: list[Fault] = [
    LATE,
    NO_NUMBER,
    *plain(REFUSED, BROKEN, UNREAD, UNREACHABLE, Reply(200, b""), Reply(200, b"<html>"), Reply(204, b"")),
    *plain(*(refusal(status) for status in (408, 429, 500, 502, 503, 504))),
    *plain(*(refusal(503, retry_after=value) for value in ("0", "2", "100", "soon"))),
    lambda send, server: Reply(200, server.reply(send).body[:-3]),
    spoilt(lambda content: entries(content).pop()),
    spoilt(lambda content: entries(content).append({"index": 0, "score": 1, "relevance_score": 1})),
    spoilt(lambda content: entries(content)[0].update(index=-1)),
    spoilt(lambda content: wrong(content, id=f"score-{ID_PREFIX}0")),
]
"""Another try doesn't meet them."""
OTHER_MODEL = spoilt(lambda content: wrong(content, model="other"))
LASTING: list[Fault] = [
    OTHER_MODEL,
    *plain(UNTRUSTED, refusal(429, retry_after="3600"), refusal(404), Reply(404, b'{"detail": "Not Found"}')),
    *plain(*(Reply(status, b"") for status in (302, 401, 403, 405))),
]
"""The call may end with them."""
ACCUSING: list[Fault] = plain(refusal(400, "odd"), refusal(422, "odd"), Reply(413, b"too large"))
"""They make documents look bad that are not."""
FAULTS = PASSING + LASTING + ACCUSING
SECONDS = (0.0, 0.001, 0.1, 0.5, 1.0, 3.0, 7.0)


@dataclass
class Setting:
    """A call, and what happens to it.

    Attributes:
        code: Three bytes for each request: whether there is a fault, which, and when the answer comes. Requests beyond
            it are answered rightly.
        calm: The first of these three is at least that where there is a fault.
        texts: The documents, each a number from 0 to 9; the larger, the longer. All differ.
        queries: One, or as many as documents are needed from it, numbers too.
        bad: Which documents the servers refuse.
        dead: Which servers there is nobody at.
    """

    code: bytes = b""
    calm: int = 128
    texts: Sequence[int] = (1,)
    queries: Sequence[int] = (0,)
    bad: frozenset[int] = frozenset()
    servers: int = 1
    dead: frozenset[int] = frozenset()
    chunk_size: int = 128
    max_concurrency: int = 4
    max_retries: int = 2
    deadline: float | None = None
    attempt_timeout: float | None = None
    api: str = "score"
    fit: bool = False
    template: int | None = None
    most: int = 99
    ids: str = "echoed"
    named: bool = False
    jitter: float = 0.5
    met: list[Fault] = field(default_factory=list, init=False)
    slow: int = field(default=0, init=False)  # requests after which another server may have been asked as well

    def __post_init__(self) -> None:
        self.documents = [f"{index} " + "text " * 4 * number for index, number in enumerate(self.texts)]
        self.asked = [f"query {number}" + "?" * number for number in self.queries]
        if len(self.asked) > 1:
            self.asked = [self.asked[index % len(self.asked)] for index in range(len(self.documents))]
        self.server = Server(
            window=128 if self.fit else 1_000_000,
            template=self.template,
            bad=[document for number, document in zip(self.texts, self.documents, strict=True) if number in self.bad],
            most=self.most,
            ids=self.ids,
        )
        self.world = World(
            self.answer,
            servers=self.servers,
            deadline=self.deadline,
            model="m" if self.named else None,
            known=False,
            jitter=self.jitter,
            chunk_size=self.chunk_size,
            max_concurrency=self.max_concurrency,
            max_retries=self.max_retries,
            attempt_timeout=self.attempt_timeout,
        )

    def answer(self, send: Send, now: float) -> tuple[float, Outcome]:
        seconds, outcome = self.outcome(send)
        if self.servers > 1 and self.deadline is not None and self.attempt_timeout is None:
            # An attempt has up to four requests.
            self.slow += 4 * seconds >= self.deadline / (1 + self.max_retries)
        return seconds, outcome

    def outcome(self, send: Send) -> tuple[float, Outcome]:
        if self.world.hosts[-1] in self.dead:
            return 0.0, REFUSED
        whether, which, when = self.code[3 * len(self.world.sent) - 3 :][:3].ljust(3, b"\0")
        seconds = SECONDS[when % len(SECONDS)]
        late = send.timeout is not None and seconds > send.timeout
        if whether < self.calm and not late:
            return seconds, self.server.reply(send)
        fault = LATE if late else FAULTS[which % len(FAULTS)]
        self.met.append(fault)
        outcome = fault(send, self.server)
        if outcome is HANG and send.timeout is None:
            return 900.0, Failure("timeout", "timed out")
        return outcome if isinstance(outcome, tuple) else (seconds, outcome)

    def score(self) -> list[float]:
        return self.world.score(self.asked, self.documents, api=self.api, fit=self.fit)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        queries = self.asked * len(self.documents) if len(self.asked) == 1 else self.asked
        return list(zip(queries, self.documents, strict=True))

    @property
    def right(self) -> list[float]:
        """The scores, of what is left of the documents where they are fitted to the window."""
        if self.template is None or not self.fit:
            return [oracle(*pair) for pair in self.pairs]
        return [oracle(query, document[: 127 - self.template - len(query)]) for query, document in self.pairs]

    def agree(self, scores: Sequence[float], right: Sequence[float]) -> bool:
        """Whether they are the right ones, but for documents that the server gave none in their last try."""
        missing = [math.isnan(score) for score in scores]
        same = all(none or score == wanted for none, score, wanted in zip(missing, scores, right, strict=True))
        return same and sum(missing) <= self.met.count(NO_NUMBER)

    @property
    def bad_indices(self) -> list[int]:
        return [index for index, number in enumerate(self.texts) if number in self.bad]

    @property
    def is_harmless(self) -> bool:
        """Whether nothing can have gone wrong: as many faults that pass as there are retries cost time only."""
        passing = len(self.met) <= self.max_retries and all(fault in PASSING for fault in self.met)
        return passing and self.deadline is None and not self.dead and not self.bad_indices

    @property
    def may_be_accused(self) -> bool:
        """Whether good documents may look bad: by faults, or because a model list got lost, and the window with it."""
        return any(fault in ACCUSING for fault in self.met) or (self.fit and bool(self.met))

    @property
    def most_asked(self) -> int:
        """How many requests for scores the call may need, if each is answered at once.

        Pieces are full but for the last of each group; groups are documents of one query (rerank API) that are cut
        alike (fitting: at what their query leaves, or not at all). A bad document makes as many chunks be replaced by
        two as its chunk can be halved; where any chunk may be refused, it may fall apart into single documents.
        Beside chunks there are one question of each branch whether anything is accepted, one about a template, and one
        for each query.
        """
        count, queries = len(self.documents), len(set(self.asked))
        groups = (queries if self.api == "rerank" or self.fit else 1) * (2 if self.fit else 1)
        chunks = min(count, count // self.chunk_size + groups)
        halvings = len(self.bad_indices) * math.ceil(math.log2(min(count, self.chunk_size)))
        if self.most < min(count, self.chunk_size) or self.may_be_accused:
            halvings = count - 1
        questions = min(chunks, self.max_concurrency) + (1 + queries if self.fit else 0)
        chunks += count if self.fit else 0  # that turn out too long
        return chunks + 2 * min(halvings, count - 1) + questions

    def check_requests(self) -> None:
        """None is tried too often, and none is sent for nothing; another server is asked without being a retry."""
        tries, sent = self.max_retries + self.servers, self.world.score_requests
        others = self.slow * (self.servers - 1)
        same = Counter(
            json.dumps(request.content | {"request_id": None}) for request in sent if request.documents != ["a"]
        )
        assert all(count <= tries + others for count in same.values())
        # What was not a fault was the answer; but not where it did not fit a former answer by another model.
        faults = len(self.met) + sum(host in self.dead for host in self.world.hosts)
        compared = self.world.paths.count("/version") if self.servers > 1 else 0
        assert OTHER_MODEL in self.met or len(sent) <= self.most_asked + faults + others + compared
        # A try is 4 requests at most: version and models of a server that is not known, scores, and models again where
        # the model is said to be missing; one of several is compared; what a server is like, which fitting asks first,
        # takes 2 a try.
        most = 4 + (self.servers > 1)
        assert len(self.world.sent) <= tries * (most * self.most_asked + 2 * self.fit) + most * others
        assert self.world.most_at_once <= self.max_concurrency * (self.servers if self.slow else 1)


numbers = st.integers(0, 9)
schedules = st.builds(
    Setting,
    code=st.binary(max_size=12) | st.binary(min_size=30, max_size=150),
    calm=st.sampled_from([240, 200, 128, 30]),
    texts=st.lists(numbers, min_size=1, max_size=4) | st.lists(numbers, min_size=7, max_size=15),
    queries=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    bad=st.sampled_from([frozenset(), frozenset({1}), frozenset({0, 7}), frozenset(range(10))]),
    servers=st.integers(1, 3),
    dead=st.sampled_from([frozenset(), frozenset(), frozenset(), frozenset({0}), frozenset({1, 2})]),
    chunk_size=st.sampled_from([1, 1, 2, 3, 4, 128]),
    max_concurrency=st.sampled_from([1, 2, 3, 4, 4]),
    max_retries=st.sampled_from([0, 1, 2, 2, 3, 3]),
    deadline=st.sampled_from([None, None, 200.0, 30.0, 5.0, 1.0]),
    attempt_timeout=st.sampled_from([None, 0.4, 5.0]),
    api=st.sampled_from(["score", "rerank"]),
    fit=st.booleans(),
    template=st.sampled_from([None, 40]),
    most=st.sampled_from([99, 2]),
    ids=st.sampled_from(["echoed", "own"]),
    named=st.booleans(),
    jitter=st.sampled_from([0.5, 0.0, 0.999]),
)


# Documents turn out too long when other requests are planned, or under way: each is cut at what its own query leaves,
# and no more requests are under way at once than are allowed.
SURPRISED = {
    "code": b"\x1e\x00\x00\x00\x00\x04\x1e\x04",
    "calm": 30,
    "queries": [0, 1],
    "servers": 2,
    "chunk_size": 2,
    "max_retries": 0,
    "fit": True,
    "template": 40,
    "named": True,
}


# A fault hides how many tokens a query takes, so that its documents are cut only after they were refused as too long;
# another try is needed before that, and again after it.
LATE_CUT = Setting(
    code=bytes.fromhex("0000000000000000000000c7c8f400000003000000000003000000000011"),
    calm=200,
    texts=[0, 4],
    queries=[0, 0],
    chunk_size=2,
    max_retries=1,
    attempt_timeout=0.4,
    fit=True,
    template=40,
)


@pytest.mark.slow
@settings(max_examples=10_000)
@example(LATE_CUT)
@example(Setting(texts=[0, 0, 0, 0, 0, 4, 0, 4], max_concurrency=1, **SURPRISED))
@example(Setting(texts=[0, 0, 0, 0, 4, 1, 0, 4], max_concurrency=1, bad=frozenset({1}), **SURPRISED))
@example(Setting(texts=[0, 4, 4], max_concurrency=2, **SURPRISED))
@given(schedules)
def test_every_schedule_of_faults_ends_in_the_right_scores_or_one_of_our_errors(setting: Setting):
    """Row 70: in time, with few requests, and with nothing left running (which `World.run` sees to)."""
    world, right, error = setting.world, setting.right, None
    try:
        scores = setting.score()
        assert setting.agree(scores, right) or (OTHER_MODEL in setting.met and set(scores) == {WRONG})  # never of both
        assert not setting.bad_indices
    except RerankError as raised:
        error = raised
    assert setting.deadline is None or world.elapsed <= setting.deadline + 1e-6
    setting.check_requests()
    assert error is None or type(error).__module__ == "rag_rerank.errors"  # nothing private
    match error:
        case None:
            pass
        case DocumentRejected():
            scored = [score for score in error.scores if score is not None]
            assert [index for index, score in enumerate(error.scores) if score is None] == list(error.indices)
            others = [score for index, score in enumerate(right) if index not in error.indices]
            assert setting.agree(scored, others) or (OTHER_MODEL in setting.met and set(scored) == {WRONG})
            assert set(error.indices) >= set(setting.bad_indices)
            assert setting.may_be_accused or list(error.indices) == setting.bad_indices
        case ConfigError():  # servers are compared
            assert OTHER_MODEL in setting.met
        case DeadlineExceeded():
            assert world.elapsed >= setting.deadline - 0.001
        case _:
            assert not setting.is_harmless
            assert error.attempts <= len(world.sent)


# One server answers as another model would, once: what it gave a pair of letters then is not held against the others.
ANOTHER_ONCE = Setting(code=b"\x00\x00\x00\x00\x00\x00\x1e\x18", calm=30, texts=[0], servers=2, max_retries=0)


@settings(max_examples=1000)
@example(ANOTHER_ONCE)
@given(schedules.filter(lambda setting: not setting.dead))
def test_after_any_schedule_of_faults_servers_that_work_are_asked_and_give_the_right_scores(setting: Setting):
    """Nothing that is remembered of faults does harm when they are over: half a minute later all rests have ended."""
    with contextlib.suppress(RerankError):
        setting.score()
    world = setting.world
    world.answer, world.deadline = setting.server, None
    world.now += 31
    before = len(world.sent)
    for _ in range(setting.servers):
        assert world.score("q", ["a"]) == [oracle("q", "a")]
    assert len(world.sent) - before <= (3 + (setting.servers > 1)) * setting.servers


@settings(max_examples=500)
@given(schedules, st.randoms(use_true_random=False))
def test_chunks_order_and_duplicates_change_no_score(setting: Setting, random: Random):
    """Row 71: cut, shuffled or repeated, whenever answers come, a pair's score is the same."""
    calm = replace(setting, calm=256, dead=frozenset(), bad=frozenset(), deadline=None, attempt_timeout=None)
    order = [random.randrange(len(calm.texts)) for _ in range(2 * len(calm.texts))]
    pairs = [calm.pairs[index] for index in order]
    scores = calm.score()
    assert scores == calm.right
    calm.world.rules = replace(calm.world.rules, chunk_size=random.randint(1, 30), max_concurrency=random.randint(1, 9))
    queries = [query for query, _ in pairs] if len(calm.asked) > 1 else calm.asked
    again = calm.world.score(queries, [document for _, document in pairs], api=calm.api, fit=calm.fit)
    assert again == [scores[index] for index in order]
