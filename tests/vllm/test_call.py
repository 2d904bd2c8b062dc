"""How a call is cut into requests, rejected documents found, and over-long ones cut; on a virtual clock."""

import itertools
import json
from collections.abc import Collection
from dataclasses import replace

import pytest

from rag_rerank import AuthError, BackendRejected, BackendUnavailable, BadReply, ConfigError, DocumentRejected
from rag_rerank.vllm.exchange import Send
from rag_rerank.vllm.wire import Reply
from tests.faulty_server import oracle
from tests.vllm.virtual import BUSY, REFUSED, Outcome, Script, Server, World, always, at, documents_of, refusal


def older(send: Send, now: float) -> tuple[float, Outcome]:
    """Answer as a server of a version whose logits are wrong."""
    reply = Server(version="0.20.2").reply(send)
    wrong = b'"score": 9.' if b'"use_activation": false' in (send.request.body or b"") else b'"score": 0.'
    return 0.0, replace(reply, body=reply.body.replace(b'"score": 0.', wrong))


def texts(count: int) -> list[str]:
    return [f"document {number:03}" for number in range(count)]


def exact(query: str, documents: list[str]) -> list[float]:
    return [oracle(query, document) for document in documents]


class TestChunks:
    """A call is cut into requests that hold not too much."""

    @pytest.mark.parametrize(
        ("count", "size", "sizes"),
        [(1, 1, [1]), (5, 128, [5]), (4, 2, [2, 2]), (5, 2, [2, 2, 1]), (128, 128, [128]), (129, 128, [128, 1])],
    )
    def test_a_chunk_has_at_most_chunk_size_documents(self, count: int, size: int, sizes: list[int]):
        """In the caller's order, and every one of them once."""
        world = World(chunk_size=size)
        assert world.score("q", texts(count)) == exact("q", texts(count))
        assert [len(sent.documents) for sent in world.sent] == sizes
        assert list(itertools.chain.from_iterable(sent.documents for sent in world.sent)) == texts(count)

    def test_one_query_is_sent_once_a_request(self):
        """Not once for each document."""
        world = World(chunk_size=2)
        world.score("q", texts(3))
        assert [sent.content["text_1"] for sent in world.sent] == ["q", "q"]

    def test_many_queries_go_with_their_documents(self):
        """N:N is cut on both sides alike."""
        world = World(chunk_size=2)
        queries, documents = ["q", "q", "r"], texts(3)
        assert world.score(queries, documents) == [oracle(*pair) for pair in zip(queries, documents, strict=True)]
        assert [sent.content["text_1"] for sent in world.sent] == [["q", "q"], "r"]

    def test_one_query_for_one_document_is_both_one_to_many_and_many_to_many(self):
        """The same request."""
        world = World()
        assert world.score(["q"], ["a"]) == [oracle("q", "a")]
        assert world.sent[0].content["text_1"] == "q"

    def test_options_go_with_every_request(self):
        """Just as they are."""
        world = World(chunk_size=1)
        world.score("q", ["a", "b"], use_activation=False, priority=3)
        assert [(sent.content["use_activation"], sent.content["priority"]) for sent in world.sent] == [(False, 3)] * 2

    @pytest.mark.parametrize("version", ["0.14.0", "0.30.1", "0.31.0"])
    @pytest.mark.parametrize(
        ("score", "logit", "is_right"),
        [
            (0.25, -1.0986, True),
            (0.25, -2.5, False),
            (0.0001, -9.2102, True),
            (0.0001, -5.0, False),
            (0.0, -150.0, True),
            (0.99999994, 20.0, True),
            (0.999, 2.0, False),
            (0.7, 0.7, True),  # cosines, and models without an activation
            (7.5, 30.0, True),  # sums over tokens
        ],
    )
    def test_wrong_logits_are_refused(self, version: str, score: float, logit: float, is_right: bool):
        """Of versions that leave out more than the activation, for some models: one look tells, in a minute."""

        def answer(send: Send, now: float) -> tuple[float, Outcome]:
            reply = Server(version=version).reply(send)
            if send.request.body is None:
                return 0.0, reply
            content = json.loads(reply.body)
            value = score if json.loads(send.request.body).get("use_activation") is None else logit
            content["data"] = [entry | {"score": value} for entry in content["data"]]
            return 0.0, replace(reply, body=json.dumps(content).encode())

        world = World(answer, known=False, logits=True)
        if is_right or version == "0.31.0":
            for _ in range(2):
                assert world.score("q", ["a", "b"], use_activation=False) == [logit, logit]
            assert len(world.score_requests) == (2 if version == "0.31.0" else 4)
        else:
            with pytest.raises(ConfigError, match=r"vLLM 0\.\d+ gives wrong logits .* Upgrade to 0\.31 or newer"):
                world.score("q", ["a", "b"], use_activation=False)

    def test_each_servers_logits_are_looked_at(self):
        """One is newer than the other while they are upgraded."""
        world = World(at(Server(), older), servers=2, known=False, logits=True)
        assert world.score("q", ["a"], use_activation=False) == exact("q", ["a"])
        with pytest.raises(ConfigError, match=r"vLLM 0\.20 gives wrong logits"):
            world.score("q", ["a"], use_activation=False)

    def test_wrong_logits_of_a_server_that_became_an_older_one_are_refused_each_time(self):
        """What was known of the former one is no way out."""
        world = World(Server(), known=False, logits=True)
        assert world.score("q", ["a"], use_activation=False) == exact("q", ["a"])
        world.now += 61
        world.answer = older
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"vLLM 0\.20 gives wrong logits"):
                world.score("q", ["a"], use_activation=False)

    def test_an_option_that_the_server_does_not_know_is_an_error(self):
        """Nothing is sent with it left out."""
        world = World(Server(version="0.19.0"), known=False)
        with pytest.raises(ConfigError, match="instruction"):
            world.score("q", ["a"], instruction="i")
        assert world.score_requests == []

    def test_a_bad_reply_names_the_document_by_its_position_in_the_call(self):
        """Not in its request."""

        def answer(send: Send, now: float) -> tuple[float, Outcome]:
            reply = Server().reply(send)
            second = "document 002" in documents_of(send)
            return 0.0, replace(reply, body=reply.body.replace(b'"index": 1', b'"index": 0')) if second else reply

        with pytest.raises(BadReply, match=r"two scores for documents\[2\]"):
            World(answer, chunk_size=2).score("q", texts(4))

    def test_documents_that_are_alike_are_all_sent(self):
        """Each gets its score."""
        world = World(chunk_size=2)
        assert world.score("q", ["a"] * 5) == exact("q", ["a"] * 5)


class TestRerankApi:
    """Servers that have only a rerank API."""

    def test_scores_come_back_in_the_order_of_the_documents(self):
        """Though the server sorts them."""
        world = World()
        assert world.score("q", texts(5), api="rerank") == exact("q", texts(5))
        assert world.paths == ["/v1/rerank"]
        assert world.sent[0].content.keys() == {"model", "query", "documents", "request_id"}

    def test_documents_go_together_by_query(self):
        """A request has one, whose documents may come from anywhere in the call."""
        queries, documents = ["q", "r", "q", "s", "q", "r"], texts(6)
        world = World(chunk_size=2)
        scores = world.score(queries, documents, api="rerank")
        assert scores == [oracle(*pair) for pair in zip(queries, documents, strict=True)]
        asked = {(sent.content["query"], *sent.documents) for sent in world.sent}
        assert asked == {
            ("q", documents[0], documents[2]),
            ("q", documents[4]),
            ("r", documents[1], documents[5]),
            ("s", documents[3]),
        }

    def test_a_rejected_document_is_found(self):
        """By the same halving."""
        world = World(Server(bad=["document 003"]))
        with pytest.raises(DocumentRejected) as caught:
            world.score("q", texts(8), api="rerank")
        assert caught.value.indices == (3,)
        assert set(world.paths) == {"/v1/rerank"}

    def test_documents_are_cut_there_too(self):
        """The tokens of template and query are counted by the same API."""
        world = World(Server(template=20, window=64), known=False)
        assert world.score("query", ["x" * 100], api="rerank", fit=True) == [oracle("query", "x" * 38)]
        assert set(world.paths) == {"/version", "/v1/models", "/v1/rerank"}


class TestConcurrency:
    """Some requests at once, never more than allowed."""

    @pytest.mark.parametrize(("concurrency", "rounds"), [(1, 10), (3, 4), (4, 3), (10, 1), (99, 1)])
    def test_chunks_are_sent_side_by_side(self, concurrency: int, rounds: int):
        """Ten requests of one second each."""
        world = World(Server(seconds=1.0), chunk_size=1, max_concurrency=concurrency)
        assert world.score("q", texts(10)) == exact("q", texts(10))
        assert world.most_at_once == min(10, concurrency)
        assert world.elapsed == rounds

    def test_a_slow_request_holds_up_no_other(self):
        """The next begins when any is done, not when all are."""
        durations = {"document 000": 10.0}
        server = Server()

        def answer(send: Send, now: float) -> tuple[float, Outcome]:
            return durations.get(documents_of(send)[0], 1.0), server.reply(send)

        world = World(answer, chunk_size=1, max_concurrency=2)
        assert world.score("q", texts(11)) == exact("q", texts(11))
        assert world.elapsed == 10

    def test_answers_in_any_order_go_to_their_documents(self):
        """The last request is answered first."""
        durations = itertools.count(10, -1)
        server = Server()
        world = World(lambda send, now: (next(durations), server.reply(send)), chunk_size=2, max_concurrency=9)
        assert world.score("q", texts(9)) == exact("q", texts(9))

    def test_one_failure_ends_the_other_requests_at_once(self):
        """Row 16: nobody wants their scores any more."""
        slow, server = 5.0, Server()

        def answer(send: Send, now: float) -> tuple[float, Outcome]:
            first = "document 000" in documents_of(send)
            return (1.0, Reply(401, b"")) if first else (slow, server.reply(send))

        world = World(answer, chunk_size=1, max_concurrency=4)
        with pytest.raises(AuthError):
            world.score("q", texts(10))
        assert world.elapsed == 1
        assert len(world.sent) == 4

    def test_an_outage_costs_three_requests_a_piece(self):
        """Row 16: of those that were begun."""
        world = World(always(refusal(500)), chunk_size=32)
        with pytest.raises(BackendUnavailable):
            world.score("q", texts(100))
        assert len(world.sent) <= 12

    def test_what_is_found_on_the_way_is_shared_too(self):
        """Halves of a refused chunk are done by whichever branch is free."""
        world = World(Server(bad=["document 000"], seconds=1.0), chunk_size=16, max_concurrency=2)
        with pytest.raises(DocumentRejected):
            world.score("q", texts(64))
        assert world.most_at_once == 2
        assert world.elapsed <= 8


def work_of(world: World) -> list[int]:
    """Which servers got the requests that are more than a question."""
    return [host for sent, host in zip(world.sent, world.hosts, strict=True) if sent.documents != ["a"]]


def requests_for(bad: Collection[int], count: int, size: int, **server: object) -> int:
    """How many requests a call takes with these documents refused; all else about it is checked."""
    documents = texts(count)
    refused = [documents[position] for position in bad]
    world = World(Server(bad=refused, **server), chunk_size=size)
    with pytest.raises(DocumentRejected) as caught:
        world.score("q", documents)
    assert caught.value.indices == tuple(sorted(bad))
    scores = [None if document in refused else oracle("q", document) for document in documents]
    assert list(caught.value.scores) == scores
    return len(world.sent)


class TestIsolation:
    """A rejected document costs only itself."""

    @pytest.mark.parametrize("position", [0, 1, 15, 16, 30, 31])
    def test_one_bad_document_of_32_costs_11_requests_more(self, position: int):
        """Row 18: the chunk, the question whether anything is accepted, and two for each of five halvings."""
        assert requests_for([position], count=32, size=32) == 12

    def test_it_costs_one_less_where_something_was_accepted_before(self):
        """Then the server takes requests like these."""
        documents = [*texts(32), "bad"]
        world = World(Server(bad=["bad"]), chunk_size=32, max_concurrency=1)
        with pytest.raises(DocumentRejected):
            world.score("q", documents)
        assert [len(sent.documents) for sent in world.sent] == [32, 1]

    def test_a_server_that_refuses_everything_is_asked_twice(self):
        """Row 19: the chunk and one harmless document; the refusal of the chunk is the answer."""
        reply = refusal(400, "unknown parameter")
        world = World(always(reply))
        with pytest.raises(BackendRejected, match="answered 400: unknown parameter") as caught:
            world.score("q", texts(32))
        assert type(caught.value) is BackendRejected
        assert [len(sent.documents) for sent in world.sent] == [32, 1]
        assert world.sent[1].content["text_1"] == "q"

    def test_a_server_that_refuses_everything_is_asked_no_more_by_chunks_side_by_side(self):
        """Each asks twice at most."""
        world = World(always(refusal(400, "unknown parameter"), 1.0), chunk_size=32)
        with pytest.raises(BackendRejected, match="unknown parameter"):
            world.score("q", texts(100))
        assert len(world.sent) == 8

    @pytest.mark.parametrize("positions", [(0, 32, 64), (31, 63, 95), (5, 50, 99), (0, 97, 98)])
    def test_three_bad_documents_in_three_chunks_cost_33_requests_at_most(self, positions: tuple[int, ...]):
        """Row 20: 37 in all."""
        assert requests_for(positions, count=100, size=32) <= 37

    def test_a_bad_document_that_is_alone_is_found_with_one_question(self):
        """Is it the document, or everything?"""
        assert requests_for([0], count=1, size=32) == 2

    def test_all_documents_may_be_bad(self):
        """Where a harmless one is accepted: every chunk of the tree, and the question."""
        assert requests_for(range(8), count=8, size=8) == 16

    @pytest.mark.parametrize("status", [400, 422])
    def test_both_statuses_of_a_refusal_are_looked_into(self, status: int):
        """vLLM says 400, some gateways 422."""
        server = Server()

        def answer(send: Send, now: float) -> tuple[float, Outcome]:
            return 0.0, refusal(status, "odd") if "b" in documents_of(send) else server.reply(send)

        with pytest.raises(
            DocumentRejected, match=rf"^documents\[1\] rejected: the server answered {status}: odd"
        ) as e:
            World(answer).score("q", ["a", "b"])
        assert e.value.status == status

    @pytest.mark.parametrize("status", [302, 401, 403, 404, 405])
    def test_other_refusals_concern_the_whole_call(self, status: int):
        """Nothing is halved for them."""
        world = World(always(Reply(status, b"")))
        with pytest.raises(BackendRejected) as caught:
            world.score("q", texts(8))
        assert not isinstance(caught.value, DocumentRejected)
        assert len(world.sent) == 1

    def test_too_large_a_request_is_halved_until_it_fits(self):
        """Row 23: 413 needs no question, for less is always less."""
        world = World(Server(most=10))
        assert world.score("q", texts(32)) == exact("q", texts(32))
        assert [len(sent.documents) for sent in world.sent] == [32, 16, 8, 8, 16, 8, 8]

    def test_a_document_that_is_too_large_alone_is_rejected(self):
        """The others are scored."""
        server = Server()

        def answer(send: Send, now: float) -> tuple[float, Outcome]:
            size = sum(map(len, documents_of(send)))
            return 0.0, Reply(413, b"<html>Payload Too Large") if size > 50 else server.reply(send)

        documents = ["a", "b" * 51, "c"]
        with pytest.raises(DocumentRejected, match=r"documents\[1\] rejected.*413") as caught:
            World(answer).score("q", documents)
        assert caught.value.scores == (oracle("q", "a"), None, oracle("q", "c"))

    def test_over_long_documents_cost_little(self):
        """They come together in one half: 8 of 32, of which 63 requests would be needed were they spread out."""
        documents = [f"{number:03}" + ("x" * 500 if number % 4 == 0 else "") for number in range(32)]
        world = World(Server(window=100))
        with pytest.raises(DocumentRejected, match=r"\[0\] and 7 more .*context length.*Set max_tokens_per_doc=") as e:
            world.score("q", documents)
        assert e.value.indices == tuple(range(0, 32, 4))
        assert len(world.sent) == 20

    def test_pairs_are_halved_with_their_queries(self):
        """N:N; the harmless pair then has a harmless query, too."""
        queries, documents = [f"query {number}" for number in range(8)], texts(8)
        world = World(Server(bad=[documents[5]]))
        with pytest.raises(DocumentRejected) as caught:
            world.score(queries, documents)
        assert caught.value.indices == (5,)
        right = [oracle(*pair) for pair in zip(queries, documents, strict=True)]
        assert [*caught.value.scores] == [*right[:5], None, *right[6:]]
        assert world.sent[1].content["text_1"] == world.sent[1].content["text_2"][0] == "a"

    def test_a_query_that_is_too_long_is_not_the_documents_fault(self):
        """The harmless document is refused with it as well."""
        world = World(Server(window=100))
        with pytest.raises(BackendRejected, match="maximum context length") as caught:
            world.score("q" * 200, texts(4))
        assert not isinstance(caught.value, DocumentRejected)
        assert len(world.sent) == 2

    def test_a_question_whose_answer_another_request_gave_meanwhile_is_settled(self):
        """It was refused for a reason of its own, a hiccup: that something like it is accepted is known by then."""
        server = Server(bad=["document 000"])

        def answer(send: Send, now: float) -> tuple[float, Outcome]:
            documents = documents_of(send)
            if documents == ["a"]:
                return 3.0, refusal(400)
            return (1.0 if "document 000" in documents else 2.0), server.reply(send)

        with pytest.raises(DocumentRejected) as caught:
            World(answer, chunk_size=2).score("q", texts(4))
        assert caught.value.indices == (0,)

    def test_a_failure_while_looking_is_the_calls_failure(self):
        """It got no scores for a reason of its own."""
        world = World(Script(refusal(400), *[REFUSED] * 3))
        with pytest.raises(BackendUnavailable):
            world.score("q", texts(4))
        with pytest.raises(AuthError):
            World(Script(refusal(400), None, Reply(401, b""))).score("q", texts(4))

    def test_a_fault_while_looking_is_tried_again(self):
        """As anywhere."""
        world = World(Script(None, BUSY, None, None, None, BUSY, server=Server(bad=["document 002"])))
        with pytest.raises(DocumentRejected) as caught:
            world.score("q", texts(4))
        assert caught.value.indices == (2,)

    def test_equal_documents_are_judged_each_by_itself(self):
        """All copies of a bad one are named."""
        world = World(Server(bad=["bad"]))
        with pytest.raises(DocumentRejected) as caught:
            world.score("q", ["bad", "a", "bad", "b", "bad"])
        assert caught.value.indices == (0, 2, 4)

    def test_the_error_tells_all_that_is_known(self):
        """Which, why, how many, where, and the first refusal as its cause."""
        world = World(Server(bad=["document 001", "document 006"]))
        with pytest.raises(DocumentRejected) as caught:
            world.score("q", texts(8))
        error = caught.value
        assert str(error).startswith("documents[1] and 1 more rejected: the server answered 400: Out of range float")
        assert (error.endpoint, error.attempts, error.status) == ("server0:1", len(world.sent), 400)
        assert error.elapsed == pytest.approx(world.elapsed)
        assert type(error.__cause__) is BackendRejected

    def test_the_question_takes_no_servers_turn(self):
        """The work goes round as if it had not been asked."""
        world = World(Server(bad=["document 000"]), servers=2)
        with pytest.raises(DocumentRejected):
            world.score("q", texts(4))
        assert len(world.sent) == 6
        assert work_of(world) == [0, 1, 0, 1, 0]

    def test_the_error_names_the_server_that_rejected_the_first_one(self):
        """Not all of them."""
        world = World(Server(bad=["document 001"]), servers=2)
        with pytest.raises(DocumentRejected) as caught:
            world.score("q", texts(4))
        assert caught.value.endpoint in {"server0:1", "server1:1"}

    def test_the_callers_documents_stay_as_they_are(self):
        """Sorting by length happens elsewhere."""
        documents = ["ccc", "bad", "a", "dddd"]
        with pytest.raises(DocumentRejected):
            World(Server(bad=["bad"])).score("q", documents)
        assert documents == ["ccc", "bad", "a", "dddd"]


def fitted(server: Server, queries: str | list[str], documents: list[str], **options: object) -> World:
    """The world after a call that fits documents to the model, and its scores in it."""
    world = World(server, known=False)
    world.scores = world.score(queries, documents, fit=True, **options)
    return world


class TestFitting:
    """Documents that are too long for the model are cut where a cut does no harm."""

    def test_short_texts_cause_no_extra_request(self):
        """No tokenizer makes more tokens than bytes; nothing is cut where there may be a template."""
        for template in (None, 40):
            world = fitted(Server(template=template, window=4096), "q", texts(3))
            assert world.paths == ["/version", "/v1/models", "/v1/score"]
            assert "truncate_prompt_tokens" not in world.sent[-1].content
            assert world.scores == exact("q", texts(3))

    def test_a_template_that_is_longer_than_expected_is_found_out(self):
        """1,500 tokens: the server says that it is too long; then what is left is counted, and nothing cut off."""
        document = "x" * 2900
        world = fitted(Server(template=1500, window=4000), "q", ["a", document])
        assert world.scores == [oracle("q", "a"), oracle("q", document[:2498])]

    @pytest.mark.parametrize("at_once", [1, 2])
    def test_it_is_found_out_once_for_all_requests_of_a_query(self, at_once: int):
        """Those that are planned are cut anew, each pair at what its own query leaves; those under way are repeated."""
        server, queries = Server(template=1500, window=4000), ["query", "query", "query", "q"]
        documents = [letter * 2900 for letter in "abcd"]

        def answer(send: Send, now: float) -> tuple[float, Outcome]:
            second = send.request.body is not None and documents[2] in documents_of(send)
            return 5.0 if second else 0.01, server.reply(send)

        world = World(answer, known=False, chunk_size=2, max_concurrency=at_once)
        assert world.score(queries, documents, fit=True) == [
            oracle(query, document[: 2499 - len(query)]) for query, document in zip(queries, documents, strict=True)
        ]
        measured = [sent.content["text_1"] for sent in world.score_requests if sent.documents == ["a"]]
        assert measured == ["a", "query", "q"]
        assert len(world.score_requests) == 7 + at_once

    def test_a_server_that_may_have_restarted_is_asked_anew_before_a_document_is_cut(self):
        """Now with a template, or another window: its connections are gone, or it was asked long ago."""
        for restarted in (Server(window=64, template=20), Server(window=32)):
            for is_open, seconds in ((False, 1), (True, 61)):
                world = fitted(Server(window=64), "q", ["x" * 100])
                world.answer = restarted
                world.each_server[0].is_connected = lambda: is_open  # noqa: B023
                world.now += seconds
                right = oracle("q", "x" * 42) if restarted.template else oracle("q", "x" * 100)
                assert world.score("q", ["x" * 100], fit=True) == [right]

    def test_nor_is_its_template_remembered_when_it_was_asked_anew_for_a_short_one(self):
        """The same model in the same window, and a template now."""
        world = fitted(Server(window=4096), "q", ["x" * 5000])
        world.answer = Server(window=4096, template=20)
        world.now += 61
        world.score("q", ["x"], fit=True)
        assert world.score("q", ["x" * 5000], fit=True) == [oracle("q", "x" * 4074)]

    def test_a_smaller_window_shows_in_a_refusal(self):
        """Of a document that was short for the former one; nothing else told that the server was started again."""
        world = fitted(Server(template=20, window=4096), "q", ["x" * 100])
        for window in (64, 40):  # the former cut is too long, then
            world.answer = Server(template=20, window=window)
            assert world.score("q", ["x" * 100], fit=True) == [oracle("q", "x" * (window - 22))]

    def test_a_server_that_does_not_cut_is_asked_anew_once(self):
        """A gateway that drops max_tokens_per_doc: each document is refused, and looked for as ever."""
        server, long = Server(template=20, window=64), [letter * 100 for letter in "xyz"]

        def answer(send: Send, now: float) -> tuple[float, Outcome]:
            refused = send.request.body is not None and set(long) & set(documents_of(send))
            return 0.0, refusal(400, "maximum context length is 64") if refused else server.reply(send)

        world = World(answer, known=False)
        with pytest.raises(DocumentRejected) as caught:
            world.score("q", [*long, "a"], fit=True)
        assert caught.value.indices == (0, 1, 2)
        assert world.paths.count("/version") == 2

    @pytest.mark.parametrize(("length", "requests"), [(3071, 1), (3072, 2)])
    def test_short_is_what_fits_with_a_thousand_tokens_of_template(self, length: int, requests: int):
        """Query and document in bytes, with 1,024 tokens beside them, of 4,096."""
        world = fitted(Server(window=4096), "q", ["ß" * (length // 2) + "x" * (length % 2)])
        assert len(world.score_requests) == requests

    def test_what_is_not_to_be_fitted_is_not_cut(self):
        """Then over-long documents are rejected."""
        world = World(Server(window=64))
        with pytest.raises(DocumentRejected):
            world.score("q", ["a", "x" * 100])
        assert all("truncate_prompt_tokens" not in sent.content for sent in world.sent)

    def test_without_a_template_the_server_cuts(self):
        """The longer of query and document; one small request, once, finds out that there is none."""
        world = fitted(Server(window=64), "q", ["x" * 100, "y"])
        assert world.scores == exact("q", ["x" * 100, "y"])
        assert [sent.documents for sent in world.score_requests] == [["a"], ["x" * 100, "y"]]
        assert world.sent[-1].content["truncate_prompt_tokens"] == -1
        assert world.servers.facts.has_template is False
        world.score("q", ["z" * 100], fit=True)
        assert len(world.score_requests) == 3

    def test_with_a_template_documents_are_cut_at_what_it_and_the_query_leave(self):
        """64 tokens, of which template, query and one more take 26: the end of the prompt stays whole."""
        world = fitted(Server(template=20, window=64), "query", ["x" * 100, "y"])
        assert world.scores == exact("query", ["x" * 38, "y"])
        assert [sent.content.get("max_tokens_per_doc") for sent in world.score_requests] == [None, None, 38]
        assert all("truncate_prompt_tokens" not in sent.content for sent in world.sent[2:])
        assert world.servers.facts.has_template is True

    def test_that_there_is_a_template_is_asked_once(self):
        """Not once a call; what a query leaves is asked in each."""
        world = fitted(Server(template=20, window=64), "query", ["x" * 100])
        world.score("other query", ["x" * 100], fit=True)
        assert [sent.documents[0] for sent in world.score_requests] == ["a", "a", "x" * 100, "a", "x" * 100]

    @pytest.mark.parametrize(("given", "cut"), [(10, 10), (37, 37), (38, 38), (39, 38), (1000, 38)])
    def test_the_lower_of_what_is_left_and_what_was_asked_for_wins(self, given: int, cut: int):
        """max_tokens_per_doc is a wish, the window is not."""
        world = fitted(Server(template=20, window=64), "query", ["x" * 100], max_tokens_per_doc=given)
        assert world.scores == [oracle("query", "x" * cut)]

    def test_a_wish_stays_where_nothing_is_measured(self):
        """It is an option like others."""
        world = fitted(Server(template=20, window=4096), "query", ["x" * 100], max_tokens_per_doc=10)
        assert world.scores == [oracle("query", "x" * 10)]

    def test_queries_are_measured_as_they_are_cut(self):
        """With max_tokens_per_query, more is left."""
        world = fitted(Server(template=20, window=64), "query" * 100, ["x" * 100], max_tokens_per_query=10)
        assert world.scores == [oracle(("query" * 100)[:10], "x" * 33)]

    def test_each_query_is_measured_once_and_leaves_its_own(self):
        """N:N: those that leave different numbers of tokens go in different requests."""
        queries = ["q", "query", "q", "query", "qqqqq"]
        documents = [letter * 100 for letter in "abcde"]
        world = fitted(Server(template=20, window=64), queries, documents)
        assert world.scores == [oracle(q, d[: 43 - len(q)]) for q, d in zip(queries, documents, strict=True)]
        measured = [sent.content["text_1"] for sent in world.score_requests if sent.documents == ["a"]]
        assert sorted(measured) == ["a", "q", "qqqqq", "query"]
        scored = {sent.content["max_tokens_per_doc"]: sent.documents for sent in world.score_requests[4:]}
        assert scored == {42: [documents[0], documents[2]], 38: [documents[1], documents[3], documents[4]]}

    def test_queries_are_measured_side_by_side(self):
        """Within the same bound."""
        world = World(Server(template=20, window=64, seconds=1.0), known=False, max_concurrency=3)
        queries = ["q" * length for length in range(1, 7)]
        world.score(queries, ["x" * 100] * 6, fit=True)
        assert world.most_at_once == 3
        assert world.elapsed == 2 + 1 + 2 + 2  # who it is, whether there is a template, six queries, six chunks
        world = World(Server(template=1500, window=4000), known=False, chunk_size=3, max_concurrency=2)
        world.score(queries, ["x" * 2900] * 6, fit=True)  # found out in two requests
        assert world.most_at_once == 2

    @pytest.mark.parametrize("templated", [None, True])
    def test_measuring_takes_no_servers_turn(self, templated: bool | None):
        """Were it so, one of two servers would do all the measuring and the other one all the work."""
        world = World(Server(template=20, window=64), servers=2)
        for server in world.each_server:
            server.facts = replace(server.facts, window=64, has_template=templated)
        for _ in range(4):
            world.score("q", ["x" * 100, "y"], fit=True)
        assert work_of(world) == [0, 1, 0, 1]

    def test_only_what_may_be_too_long_is_measured(self):
        """The other pairs go as they are."""
        queries, documents = ["long", "short"], ["x" * 2000, "y"]
        world = fitted(Server(template=20, window=1800), queries, documents)
        assert world.scores == [oracle("long", "x" * 1775), oracle("short", "y")]
        cuts = [(sent.content["text_1"], sent.content.get("max_tokens_per_doc")) for sent in world.score_requests]
        assert cuts == [("a", None), ("long", None), ("long", 1775), ("short", None)]

    def test_a_window_that_is_not_told_leaves_documents_as_they_are(self):
        """With a template: where to cut can't be known, and the server's own cut would do harm."""
        world = fitted(Server(template=20, tells_window=False), "q", ["x" * 100])
        assert world.scores == exact("q", ["x" * 100])
        assert world.sent[-1].content.keys() == {"model", "text_1", "text_2"}

    def test_a_window_that_is_not_told_is_the_servers_to_keep_without_a_template(self):
        """It cuts by itself."""
        world = fitted(Server(window=64, tells_window=False), "q", ["x" * 100])
        assert world.scores == exact("q", ["x" * 100])
        assert world.sent[-1].content["truncate_prompt_tokens"] == -1

    def test_versions_that_can_not_cut_documents_reject_them(self):
        """max_tokens_per_doc came with 0.20; the end of a template is never cut off."""
        world = World(Server(version="0.19.1", template=20, window=64), known=False)
        with pytest.raises(DocumentRejected) as caught:
            world.score("query", ["x" * 100, "y"], fit=True)
        assert caught.value.scores == (None, oracle("query", "y"))
        assert fitted(Server(version="0.20.0", template=20, window=64), "query", ["x" * 100]).scores == [
            oracle("query", "x" * 38)
        ]

    def test_an_unknown_version_is_taken_for_a_recent_one(self):
        """Gateways often hide /version."""
        world = fitted(Server(version=None, template=20, window=64), "query", ["x" * 100])
        assert world.scores == [oracle("query", "x" * 38)]

    @pytest.mark.parametrize("length", [3, 4, 200])
    def test_a_query_that_leaves_nothing_is_an_error(self, length: int):
        """It would have to be cut, and nobody asked for that; cutting the end of the prompt is no remedy."""
        world = World(Server(template=60, window=64), known=False)
        with pytest.raises(BackendRejected, match="64.*Shorten the query") as caught:
            world.score("q" * length, ["x" * 100], fit=True)
        assert not isinstance(caught.value, DocumentRejected)
        assert "truncate_prompt_tokens" not in str(caught.value)
        assert len(world.score_requests) == 2

    def test_of_many_queries_one_that_leaves_nothing_costs_its_own_pairs(self):
        """As without fitting."""
        world = World(Server(template=60, window=64), known=False)
        with pytest.raises(DocumentRejected) as caught:
            world.score(["q" * 200, "q"], ["x" * 100, "y" * 100], fit=True)
        assert caught.value.indices == (0,)
        assert caught.value.scores == (None, oracle("q", "y" * 2))

    def test_a_rerank_api_that_is_not_vllms_is_sent_no_field_of_vllms(self):
        """Some servers pass fields that they don't know on, and fail over them."""
        world = World(Server(version=None, window=64), known=False)
        with pytest.raises(DocumentRejected):
            world.score("q", ["x" * 30, "x" * 100], api="rerank", fit=True)
        assert all(sent.content.keys() == {"model", "query", "documents"} for sent in world.score_requests)

    def test_a_query_that_leaves_one_token_is_fine(self):
        """One of the document's."""
        assert fitted(Server(template=60, window=64), "qq", ["x" * 100]).scores == [oracle("qq", "x")]

    @pytest.mark.parametrize("template", [None, 20])
    def test_of_a_server_that_does_not_count_nothing_is_known(self, template: int | None):
        """It may have a template, so the end of no prompt is cut: a document that is too long is rejected."""
        world = World(Server(window=64, counts=False, template=template), known=False)
        with pytest.raises(DocumentRejected, match="max_tokens_per_doc=") as caught:
            world.score("q", ["x" * 100, "a"], fit=True)
        assert caught.value.scores == (None, oracle("q", "a"))

    def test_a_query_that_is_too_large_is_not_the_documents_fault(self):
        """413 for each of them, and for a harmless one."""
        world = World(always(Reply(413, b"")))
        with pytest.raises(BackendRejected, match="413") as caught:
            world.score("q" * 1000, texts(100))
        assert not isinstance(caught.value, DocumentRejected)
        assert len(world.sent) < 40

    def test_a_server_that_stops_counting_leaves_documents_as_they_are(self):
        """As much as is known is used: nothing."""
        counting, silent = Server(template=20), Server(template=20, counts=False)
        asked = itertools.count()

        def answer(send: Send, now: float) -> tuple[float, Outcome]:
            return (silent if send.request.body and next(asked) else counting)(send, now)

        world = World(answer)
        long = "x" * 1_000_000
        assert world.score("q", [long], fit=True, max_tokens_per_doc=7) == [oracle("q", long[:7])]

    @pytest.mark.parametrize(("tokens", "template"), [(8, False), (9, True)])
    def test_more_tokens_than_any_plain_pair_takes_are_a_template(self, tokens: int, template: bool):
        """The pair of "a" and "a" takes 8 at most."""
        world = fitted(Server(template=tokens - 2, window=64), "q", ["x" * 10])
        assert world.servers.facts.has_template is template

    @pytest.mark.parametrize("accepted", [0, 1])
    def test_a_refusal_of_a_small_request_is_the_calls_failure(self, accepted: int):
        """Be it about the template or a query: what takes no harmless pair takes nothing."""
        reply = Reply(200, b'{"data": [{"index": 0, "score": 0}], "usage": {"prompt_tokens": 29}}')
        world = World(Script(*[reply] * accepted, server=always(refusal(400, "odd"))))
        with pytest.raises(BackendRejected, match="odd") as caught:
            world.score("q", ["x" * 1_000_000], fit=True)
        assert caught.value.status == 400
        assert len(world.sent) == 1 + accepted

    def test_a_document_that_is_rejected_all_the_same_is_found(self):
        """Its chunk keeps its cut."""
        bad = "bad" * 50
        world = World(Server(template=20, window=64, bad=[bad]), known=False)
        with pytest.raises(DocumentRejected) as caught:
            world.score("query", ["x" * 100, bad, "y" * 100], fit=True)
        assert caught.value.scores == (oracle("query", "x" * 38), None, oracle("query", "y" * 38))
