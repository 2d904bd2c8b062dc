"""What is known of a server: learnt with the first call, compared with others, and asked anew; on a virtual clock."""

import asyncio

import pytest

from rag_rerank import (
    AuthError,
    BackendRejected,
    BackendUnavailable,
    BadReply,
    ConfigError,
)
from rag_rerank.vllm.exchange import Send
from rag_rerank.vllm.wire import Reply, ServerFacts
from tests.faulty_server import oracle
from tests.vllm.test_exchange import EMPTY, MISSING, SCORES, learn, off_by, score
from tests.vllm.virtual import (
    BROKEN,
    BUSY,
    HANG,
    REFUSED,
    UNREAD,
    Outcome,
    Script,
    Server,
    World,
    after,
    always,
    at,
    refusal,
)


class TestLearning:
    """What a server is asked before the first score."""

    def test_a_server_is_asked_once(self):
        """Version, models, and then scores only."""
        world = World(known=False)
        assert score(world) == score(world) == SCORES
        assert world.paths == ["/version", "/v1/models", "/v1/score", "/v1/score"]

    def test_each_server_is_asked_for_itself(self):
        """They may differ in version."""
        world = World(at(Server(), Server(version="0.30.1")), servers=2, known=False)
        assert score(world) == score(world) == SCORES
        assert [server.facts.version for server in world.each_server] == [(0, 32), (0, 30)]
        assert world.paths == ["/version", "/v1/models", "/v1/score", "/v1/score"] * 2

    def test_servers_that_score_otherwise_are_refused(self):
        """Calls would mix their scores: of two models of one name, or with a template and without."""
        for odd in (Server(template=40), off_by(0.2)):
            world = World(at(Server(), odd), servers=2, known=False)
            assert score(world) == SCORES  # only one was asked so far
            with pytest.raises(ConfigError, match="pair of letters"):
                score(world)
            world.answer = Server()  # both are started again
            assert score(world) == score(world) == SCORES

    def test_calls_that_begin_together_compare_servers_once(self):
        """A server that is new has enough to do."""
        world = World(servers=2, known=False)
        assert world.at_once(18) == [SCORES] * 18
        assert len(world.score_requests) == 18 + 2

    @pytest.mark.parametrize("seconds", [0.0, 0.5])
    def test_calls_that_begin_together_mix_no_scores(self, seconds: float):
        """They wait for what the first of them learns; none goes on as if there were no other server."""

        def slow(send: Send, now: float) -> tuple[float, Outcome]:
            return seconds, off_by(0.2)(send, now)[1]

        world = World(at(Server(), slow), servers=2, known=False, chunk_size=1)

        async def calls() -> list[list[float] | BaseException]:
            each = (world.call("q", ["a", "b", "c"]) for _ in range(9))
            return await asyncio.gather(*each, return_exceptions=True)

        for _ in range(2):
            assert {type(outcome) for outcome in world.run(calls())} == {ConfigError}

    def test_a_server_that_can_not_be_compared_yet_gives_no_scores(self):
        """Another one does."""
        busy = off_by(0.2)
        world = World(at(Server(), lambda send, now: (0.0, BUSY) if send.request.body else busy(send, now)), servers=2)
        for server in world.each_server:
            server.facts = None
        assert score(world) == score(world) == SCORES
        world.answer, world.now = at(Server(), busy), world.now + 2
        with pytest.raises(ConfigError, match="pair of letters"):
            score(world), score(world)

    def test_a_comparison_that_is_given_up_is_no_ones_answer(self):
        """Who waited for it asks."""
        world = World(at(Server(seconds=1.0), Server(seconds=1.0)), servers=2, known=False)

        async def calls() -> list[float]:
            first, second = (asyncio.create_task(world.call("q", ["a", "b"])) for _ in range(2))
            await asyncio.sleep(2.5)
            first.cancel()
            return await second

        assert world.run(calls()) == SCORES
        assert all(server.asking is None for server in world.each_server)

    def test_rounding_is_no_other_score(self):
        """Two machines in half precision differ by so much."""
        world = World(at(Server(), off_by(0.01)), servers=2, known=False)
        assert score(world) + score(world) == pytest.approx(SCORES * 2, abs=0.02)

    def test_a_description_is_that_of_one_server(self):
        """Of one that is known, if there is one; nothing is asked then."""
        world = World(servers=2, known=False)
        assert learn(world) == learn(world) == ServerFacts((0, 32), "m", "org/m", 1_000_000)
        assert world.paths == ["/version", "/v1/models", "/v1/score"]

    def test_a_description_is_tried_for_as_a_score_is(self):
        """By the same rules."""
        world = World(Script(None, BROKEN, None, refusal(500)), known=False)
        assert learn(world).model == "m"
        assert world.slept == [0.5]

    def test_a_named_model_is_looked_up(self):
        """Its checkpoint and window tell what it is."""
        models = Reply(200, b'{"data": [{"id": "o"}, {"id": "mine", "root": "org/x", "max_model_len": 512}]}')
        world = World(Script(None, models), known=False, model="mine")
        assert learn(world) == ServerFacts((0, 32), "mine", "org/x", 512)

    @pytest.mark.parametrize(
        "models", [Reply(404, b""), MISSING, Reply(401, b""), Reply(200, b'{"data": []}'), Reply(200, b"nginx")]
    )
    def test_a_named_model_needs_no_list_of_models(self, models: Reply):
        """A gateway may have none, or name models differently."""
        world = World(Script(None, models), known=False, model="mine")
        assert learn(world) == ServerFacts(None, "mine")
        assert len(world.sent) == 2

    @pytest.mark.parametrize("reply", [BUSY, refusal(500), UNREAD, Reply(200, b"nginx"), BROKEN])
    def test_what_a_server_need_not_tell_stops_no_call(self, reply: Outcome):
        """It is not known then, and asked again soon; nothing is held against the server."""
        asked = ["/version", "/v1/models"] if reply is not BROKEN else ["/version"] * 2 + ["/v1/models"] * 2

        def answer(send: Send, now: float) -> tuple[float, Outcome]:
            if send.request.body is not None:
                assert not world.each_server[0].back_off.resting
            return (0.0, reply) if send.request.body is None else Server()(send, now)

        world = World(answer, known=False, model="m")
        assert score(world) == SCORES
        assert score(world) == SCORES
        assert world.paths == [*asked, "/v1/score", "/v1/score"]
        world.now += 6
        assert score(world) == SCORES
        assert world.paths[len(asked) + 2 :] == [*asked, "/v1/score"]

    def test_what_a_server_never_tells_leaves_time_for_the_scores(self):
        """A gateway that lets such requests hang: each gets a third of what is left, once in a minute."""

        def answer(send: Send, now: float) -> tuple[float, Outcome]:
            return HANG if send.request.body is None else Server()(send, now)

        world = World(answer, known=False, model="m", deadline=9)
        assert score(world) == SCORES
        assert world.elapsed == pytest.approx(5.01)
        world.now += 6
        assert score(world) == SCORES
        assert world.paths == ["/version", "/v1/models", "/v1/score", "/v1/score"]

    def test_another_programs_version_is_not_vllms(self):
        """A router's, whose list of models does not tell how long prompts may be; a source build's says nothing."""
        world = World(Server(version="0.1.10", tells_window=False), known=False)
        assert world.score("q", ["a"], instruction="i") == [oracle("q", "a")]
        assert learn(World(Server(version="0.1.dev1+gabc"), known=False)).version is None

    def test_what_is_known_is_asked_anew_after_a_minute(self):
        """The server may have been started again with other options."""
        world = World(known=False)
        assert score(world) == SCORES
        world.answer = Server(window=99)
        world.now += 61
        assert score(world) == SCORES
        assert world.servers.facts.window == 99
        assert world.paths == ["/version", "/v1/models", "/v1/score"] * 2

    def test_a_call_that_is_given_up_while_it_asks_leaves_that_to_the_next(self):
        """What is known is not younger for it."""
        world = World(known=False)
        assert score(world) == SCORES
        world.now += 61

        async def give_up() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(world.call("q", ["a"]), 1.0)

        world.answer = always(*reversed(HANG))
        world.run(give_up())
        world.answer = Server(window=99)
        assert score(world) == SCORES
        assert world.servers.facts.window == 99

    def test_an_unnamed_model_is_the_one_that_is_served(self):
        """Aliases of one checkpoint count as one; the first is asked for."""
        models = Reply(200, b'{"data": [{"id": "a", "root": "r", "max_model_len": 8}, {"id": "b", "root": "r"}]}')
        assert learn(World(Script(None, models), known=False)) == ServerFacts((0, 32), "a", "r", 8)

    def test_several_models_must_be_chosen_from(self):
        """Guessing would score with the wrong one."""
        models = Reply(200, b'{"data": [{"id": "a"}, {"id": "b"}]}')
        with pytest.raises(ConfigError, match=r"server0:1 serves 2 models; pass model=\. It serves: a, b\."):
            learn(World(Script(None, models), known=False))

    def test_no_model_may_be_one_that_is_not_loaded_yet(self):
        """A router's list before its servers are up: asked again; then another scorer may take over."""
        none = Reply(200, b'{"data": []}')
        assert learn(World(Script(None, none), known=False)).model == "m"
        with pytest.raises(BackendUnavailable, match=r"lists no model \(server0:1, 6 attempts.*as model="):
            learn(World(Script(*[None, none] * 3), known=False))

    def test_names_of_models_are_shown_printable_and_not_without_end(self):
        """Row 67, for what else a server says: a gateway may list hundreds."""
        names = ["\x1b[31mred\n", *(f"model {number}" for number in range(1000))]
        with pytest.raises(ConfigError, match="serves 1001 models") as caught:
            learn(World(Server(models=names), known=False))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000
        with pytest.raises(BackendRejected, match="It serves") as caught:
            score(World(Server(models=names), model="m"))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000

    def test_an_unnamed_model_needs_a_list_of_models(self):
        """Where it is none, the server is tried again, and it is a bad reply in the end."""
        world = World(Script(None, Reply(200, b"nginx")), known=False)
        assert learn(world).model == "m"
        with pytest.raises(BadReply, match="not JSON"):
            learn(World(always(Reply(200, b"nginx")), known=False))

    @pytest.mark.parametrize("status", [400, 404, 405])
    @pytest.mark.parametrize("error", [True, False])
    def test_an_unnamed_model_needs_a_server_that_lists_models(self, status: int, error: bool):
        """The refusal of the list is told."""
        models = refusal(status) if error else Reply(status, b'{"detail": "no"}')

        def answer(send: Send, now: float) -> tuple[float, Outcome]:
            return (0.0, models) if send.request.path == "/v1/models" else Server()(send, now)

        for run in (learn, score):
            with pytest.raises(BackendRejected, match=f"{status}: no") as caught:
                run(World(answer, known=False))
            assert type(caught.value) is BackendRejected
            assert caught.value.status == status

    def test_a_key_that_is_missing_is_told_at_once(self):
        """vLLM guards the list of models, but not the version."""
        world = World(Script(None, Reply(401, b'{"error": "Unauthorized"}')), known=False)
        with pytest.raises(AuthError, match="VLLM_API_KEY"):
            score(world)
        assert world.paths == ["/version", "/v1/models"]

    @pytest.mark.parametrize("reply", [Reply(404, b""), MISSING, Reply(401, b""), Reply(200, b"nginx"), EMPTY])
    def test_a_gateway_that_hides_the_version_is_fine(self, reply: Reply):
        """404 on /version is an answer, too."""
        assert learn(World(Script(reply), known=False)) == ServerFacts(None, "m", "org/m", 1_000_000)

    def test_servers_of_different_models_are_refused(self):
        """A call would mix their scores."""
        world = World(at(Server(), Server(models=["n"])), servers=2, known=False)
        assert score(world) == SCORES
        with pytest.raises(ConfigError, match=r"server1:1 serves 'n', another one 'm'; pass model=\."):
            score(world)

    def test_servers_that_all_have_another_model_are_known_by_it_then(self):
        """One call is lost."""
        world = World(Server(models=["n"]), servers=2)
        world.now += 61
        with pytest.raises(ConfigError, match="serves 'n', another one 'm'"):
            score(world)
        assert score(world) == SCORES

    @pytest.mark.parametrize(("reply", "kind"), [(refusal(401), AuthError), (BUSY, BackendUnavailable)])
    def test_what_says_nothing_about_the_form_ends_the_search_for_it(self, reply: Reply, kind: type[Exception]):
        """No other form is tried, but what may pass is tried again."""
        world = World(Script(None, None, reply), known=False, max_retries=0)
        with pytest.raises(kind):
            world.score("q", ["a"], api="auto")
        assert world.paths == ["/version", "/v1/models", "/v1/score"]
        world = World(Script(None, None, BUSY), known=False)
        assert world.score("q", ["a"], api="auto") == [oracle("q", "a")]

    def test_a_server_may_come_back_with_another_model(self):
        """Where nothing else is known, the model is what is served now."""
        world = World(Script(REFUSED, server=Server(models=["n"])))
        assert score(world) == SCORES
        assert world.servers.facts.model == "n"

    def test_a_server_may_have_another_model_all_of_a_sudden(self):
        """It was started again behind a proxy, say: that costs a try, at once."""
        world = World(Server(models=["n"]))
        assert score(world) == SCORES
        assert world.paths == ["/v1/score", "/v1/models", "/version", "/v1/models", "/v1/score"]
        assert world.slept == []
        with pytest.raises(BackendRejected, match="does not serve the model 'm'.*It serves: n"):
            score(World(Server(models=["n"]), max_retries=0))

    def test_answers_by_the_former_model_and_the_new_one_are_not_mixed(self):
        """A call that has scores already ends there."""
        world = World(after(0.5, Server(models=["n"]), Server(seconds=1.0)), chunk_size=1, max_concurrency=1)
        with pytest.raises(BadReply, match="'m' and by 'n'"):
            score(world)

    def test_what_is_learnt_about_the_template_is_noted_of_known_servers(self):
        """They are started alike; one that was not asked yet tells for itself."""
        world = World(servers=3)
        world.each_server[1].facts = None
        world.servers.remember(has_template=True)
        assert [server.facts and server.facts.has_template for server in world.each_server] == [True, None, True]
