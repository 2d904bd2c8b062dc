"""What the integrations share: the scorer that fits some settings, and hints at the right names of settings."""

import asyncio
import copy
import gc
import inspect
import os
import pathlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import SecretStr

from rag_rerank import ConfigError, LocalScorer, LocalSettings, RerankError, VLLMScorer, VLLMSettings, integration
from rag_rerank.integration import did_you_mean, path_as_text
from tests.forking import forked


class Local(LocalSettings):
    """As little of a framework's class as there can be."""

    _built = None


class Secret:
    """As pydantic hides keys."""

    def get_secret_value(self) -> str:
        return "k3y"


class Remote(VLLMSettings):
    _built = None
    api_key = http_client = default_headers = default_query = None


class TestSettings:
    """Each setting of a scorer is an attribute."""

    @pytest.mark.parametrize(("settings", "scorer"), [(LocalSettings, LocalScorer), (VLLMSettings, VLLMScorer)])
    def test_names_and_defaults_are_the_scorers(self, settings: type, scorer: type):
        """All but the key and what may hold one, which each framework hides in its own way."""
        theirs = {name: parameter.default for name, parameter in inspect.signature(scorer).parameters.items()}
        for hidden in ("api_key", "http_client", "default_headers", "default_query"):
            theirs.pop(hidden, None)
        assert {name: getattr(settings, name) for name in settings.__annotations__} == theirs

    def test_the_scorer_is_built_once(self):
        """Also by many threads at once."""
        remote = Remote()
        seen: list[object] = []
        threads = [threading.Thread(target=lambda: seen.append(remote.scorer)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(map(id, seen))) == 1

    def test_a_changed_setting_builds_another(self):
        """Also one inside of a setting; the same value again does not."""
        local = Local()
        local.model_kwargs = {}
        first = local.scorer
        local.device = None
        assert local.scorer is first
        local.model_kwargs["attn_implementation"] = "eager"
        second = local.scorer
        assert second is not first
        local.device = "cpu"
        assert local.scorer is not second

    def test_a_copy_shares_the_scorer_until_it_is_changed(self):
        """And then the original keeps its own."""
        remote = Remote()
        first = remote.scorer
        other = copy.copy(remote)
        assert other.scorer is first
        other.model = "other"
        assert other.scorer is not first
        assert remote.scorer is first

    def test_a_wrong_setting_is_a_config_error(self):
        """As from the scorer itself."""
        remote = Remote()
        remote.base_url = "ftp://x"
        with pytest.raises(ConfigError):
            _ = remote.scorer

    def test_a_hidden_key_reaches_the_scorer(self):
        """In the clear only there."""
        remote = Remote()
        remote.api_key = Secret()
        assert remote.scorer.client.transport.keys

    @pytest.mark.parametrize("close", [Remote.close, lambda remote: asyncio.run(remote.aclose())])
    def test_closing_closes_the_scorer(self, close: Callable[[Remote], None]):
        """Twice does no harm, nor before it was ever used."""
        remote = Remote()
        close(remote)
        scorer = remote.scorer
        close(remote)
        close(remote)
        with pytest.raises(RerankError, match="closed"):
            scorer.score("a", "b")
        with pytest.raises(RerankError, match="This Remote is closed"):
            _ = remote.scorer


class OtherRemote(Remote):
    """Of another framework."""


def remote(kind: type[Remote] = Remote, **settings: Any) -> Remote:
    made = kind()
    made.extra_body = {"owner": "TestSharing"}  # so that nothing is shared with other tests
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def is_open(scorer: Any) -> bool:
    try:
        return scorer.score("a", []) == []
    except RerankError:
        return False


class TestSharing:
    """Components with equal settings share a scorer until the last of them is closed or collected."""

    def test_equal_settings_share_one_scorer(self):
        """Whatever their class; others have their own."""
        first, second, other = remote(), remote(OtherRemote), remote(model="other")
        assert first.scorer is second.scorer
        assert first.scorer is not other.scorer

    def test_threads_get_one_scorer(self):
        """Where all of them make a component at once."""
        start, seen = threading.Barrier(16), []

        def make() -> None:
            start.wait()
            made = remote(model="threads")
            seen.append((made.scorer, made))

        threads = [threading.Thread(target=make) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(scorer) for scorer, _ in seen}) == 1

    @pytest.mark.parametrize("close", [Remote.close, lambda remote: asyncio.run(remote.aclose())])
    def test_the_last_to_be_closed_closes_the_scorer(self, close: Callable[[Remote], None]):
        """One that is closed is so for itself; a new one gets a new scorer after that."""
        first, second = remote(), remote()
        scorer = first.scorer
        assert second.scorer is scorer
        close(first)
        close(first)
        with pytest.raises(RerankError, match="closed"):
            _ = first.scorer
        assert is_open(second.scorer)
        close(second)
        assert not is_open(scorer)
        assert is_open(remote().scorer)

    def test_one_that_was_collected_does_not_count(self):
        """Nobody will close it."""
        first, second = remote(), remote()
        scorer = first.scorer
        assert second.scorer is scorer
        del first
        second.close()
        assert not is_open(scorer)

    def test_the_last_to_be_collected_takes_the_scorer_along(self):
        """Also in a cycle. What is closed holds no scorer."""
        first, second, closed = remote(), remote(), remote()
        first.partner, second.partner = second, first
        scorer = weakref.ref(first.scorer)
        assert scorer() is second.scorer is closed.scorer
        closed.close()
        del first, second
        gc.collect()
        assert scorer() is None

    def test_a_setting_that_changes_moves_to_another_scorer(self):
        """Which may be there already; the one that is left stays open for others."""
        first, second, third = remote(), remote(), remote(model="other")
        left = first.scorer
        assert second.scorer is left is not third.scorer
        first.model = "other"
        assert first.scorer is third.scorer
        second.close()
        assert not is_open(left)
        assert is_open(first.scorer)

    def test_a_copy_stands_for_itself(self):
        """Closing it leaves the original open, and closing the original leaves it usable, used before or not."""
        original = remote()
        scorer = original.scorer
        used, unused = copy.deepcopy(original), copy.copy(original)
        assert used.scorer is scorer
        copy.copy(original).close()
        original.close()
        assert is_open(used.scorer)
        assert used.scorer is scorer
        used.close()
        assert is_open(unused.scorer)

    def test_a_copy_outlives_its_original(self):
        """The loaded model is still there for it."""
        original = remote()
        scorer = original.scorer
        unused = copy.copy(original)
        del original
        assert unused.scorer is scorer

    def test_a_scorer_that_was_closed_is_not_shared(self):
        """Not by us."""
        first = remote()
        first.scorer.close()
        assert is_open(remote().scorer)

    def test_settings_alike_are_not_equal(self):
        """A server tells 1 from true; and what a dict held when the scorer was made is what counts."""
        first = remote(extra_body={"n": 1, "in": {"a": [1]}})
        assert first.scorer is not remote(extra_body={"n": True, "in": {"a": [1]}}).scorer
        left = first.scorer
        first.extra_body["in"]["a"].append(2)
        assert remote(extra_body={"n": 1, "in": {"a": [1, 2]}}).scorer is not left
        assert first.scorer is not left

    def test_the_environment_counts(self, monkeypatch: pytest.MonkeyPatch):
        """As it was when the component was made."""
        monkeypatch.setenv("VLLM_BASE_URL", "http://one")
        first = remote()
        scorer = first.scorer
        assert remote().scorer is scorer
        monkeypatch.setenv("VLLM_BASE_URL", "http://two")
        assert remote().scorer is not scorer is first.scorer

    @pytest.mark.parametrize("name", ["HTTP_PROXY", "no_proxy", "SSL_CERT_FILE"])
    def test_so_does_the_way_to_the_server(self, monkeypatch: pytest.MonkeyPatch, name: str):
        """A proxy that was named later is asked by those that were made later."""
        first = remote(base_url="http://example.org")
        scorer = first.scorer
        monkeypatch.setenv(name, "http://localhost:1")
        assert remote(base_url="http://example.org").scorer is not scorer

    def test_keys_are_compared_and_shown_nowhere(self, monkeypatch: pytest.MonkeyPatch):
        """Another key is another scorer."""
        key, other = SecretStr("canary-k3y"), SecretStr("canary-k3y-2")
        monkeypatch.setenv("VLLM_API_KEY", "canary-k3y-3")
        components = [remote(api_key=key), remote(api_key=SecretStr("canary-k3y")), remote(api_key=other), remote()]
        scorers = [component.scorer for component in components]
        assert scorers[0] is scorers[1]
        assert len(set(scorers)) == 3
        assert "canary" not in repr(vars(integration)) + repr(list(integration._all_shared))

    def test_files_that_were_replaced_are_another_model(self, tmp_path: pathlib.Path):
        """A model that is trained and saved again under the same name; the same goes for a template."""
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(b"one")
        template = tmp_path / "t.jinja"
        template.write_text("{{ messages[0]['content'] }} {{ messages[1]['content'] }}")
        local, vllm = Local(), remote(template=str(template), truncate_prompt_tokens=None)
        local.model = str(tmp_path)
        before, rendered = local.scorer, vllm.scorer
        same = Local()
        same.model = str(tmp_path)
        assert same.scorer is before
        weights.write_bytes(b"other")
        template.write_text("{{ messages[0]['content'] }}: {{ messages[1]['content'] }}")
        again = Local()
        again.model = str(tmp_path)
        assert again.scorer is not before is local.scorer
        assert remote(template=str(template), truncate_prompt_tokens=None).scorer is not rendered

    def test_another_file_of_the_same_time_and_size_is_another_model(self, tmp_path: pathlib.Path):
        """As a link that moves on finds it where an image of a system gives all files one time."""
        for name in ("v1", "v2"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_text(name)
            for path in (tmp_path / name / "model.safetensors", tmp_path / name):
                os.utime(path, (1, 1))
        components = [Local(), Local()]
        for component, name in zip(components, ("v1", "v2"), strict=True):
            (tmp_path / "current").unlink(missing_ok=True)
            (tmp_path / "current").symlink_to(name)
            component.model = str(tmp_path / "current")
            assert component.scorer
        assert components[0].scorer is not components[1].scorer

    def test_a_finaliser_may_close_a_component_meanwhile(self):
        """The garbage collector runs where it likes, also while settings are compared."""
        first = remote()
        assert first.scorer

        class Closes(str):
            def __eq__(self, other: object) -> bool:
                first.close()
                return True

            __hash__ = None

        one = remote(extra_body={"x": Closes("x")})
        assert one.scorer is remote(extra_body={"x": Closes("x")}).scorer
        with pytest.raises(RerankError, match="closed"):
            _ = first.scorer

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks")
    def test_a_forked_child_goes_on(self):
        """Even where another thread was making components when it forked."""
        stop = threading.Event()

        def make() -> None:
            while not stop.is_set():
                assert remote(model="forked").scorer

        thread = threading.Thread(target=make)
        thread.start()
        try:
            for _ in range(20):
                assert forked(lambda: remote().scorer.score("a", [])) == 0
        finally:
            stop.set()
            thread.join()


class TestHints:
    """A wrong name is answered with the likely one."""

    @pytest.mark.parametrize(
        ("wrong", "meant"),
        [
            ("top_k", "top_n"),
            ("topn", "top_n"),
            ("model_name", "model"),
            ("url", "base_url"),
            ("cohere_api_key", "api_key"),
            ("vllm_api_key", "api_key"),
            ("treshold", None),
            ("score_treshold", "score_threshold"),
            ("zzz", None),
        ],
    )
    def test_the_likely_one(self, wrong: str, meant: str | None):
        """What other rerankers call it, or what it is spelt like."""
        known = ["top_n", "model", "base_url", "api_key", "score_threshold"]
        assert did_you_mean(wrong, known) == (f"did you mean {meant}?" if meant else "")

    def test_a_name_that_the_component_lacks_is_no_hint(self):
        """A local reranker has no address."""
        assert did_you_mean("url", ["model"]) == ""


def test_paths_become_text():
    """And nothing else does."""
    assert path_as_text(pathlib.Path("a")) == "a"
    assert path_as_text(3) == 3
