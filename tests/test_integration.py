"""What the integrations share: the scorer that fits some settings, and hints at the right names of settings."""

import asyncio
import copy
import inspect
import pathlib
import threading
from collections.abc import Callable

import pytest

from rag_rerank import ConfigError, LocalScorer, LocalSettings, RerankError, VLLMScorer, VLLMSettings
from rag_rerank.integration import did_you_mean, path_as_text


class Local(LocalSettings):
    """As little of a framework's class as there can be."""

    _built = None


class Secret:
    """As pydantic hides keys."""

    def get_secret_value(self) -> str:
        return "k3y"


class Remote(VLLMSettings):
    _built = None
    api_key = None


class TestSettings:
    """Each setting of a scorer is an attribute."""

    @pytest.mark.parametrize(("settings", "scorer"), [(LocalSettings, LocalScorer), (VLLMSettings, VLLMScorer)])
    def test_names_and_defaults_are_the_scorers(self, settings: type, scorer: type):
        """All but the key, which each framework hides in its own way."""
        theirs = {name: parameter.default for name, parameter in inspect.signature(scorer).parameters.items()}
        theirs.pop("api_key", None)
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
        assert remote.scorer._transport.has_key

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
