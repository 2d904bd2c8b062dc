"""What lets requests in: keys, and headers and query parameters such as gateways want."""

import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rag_rerank.errors import BackendUnavailable, ConfigError
from rag_rerank.vllm.endpoint import Endpoint

Key = str | Callable[[], str]
SECRET = re.compile("key|token|secret|passw|auth|credential|cookie", re.IGNORECASE)  # names of what gives access
_OURS = {"content-type", "content-length", "accept-encoding", "transfer-encoding", "host"}


class Keys:
    """The keys of some servers, by address, and what goes with each request.

    The key None is read from the environment; an empty one is not sent. Raises ConfigError where no HTTP header can
    carry it, or where it would go unencrypted to another machine without `over_http`.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        api_key: Key | Mapping[str, Key] | None,
        headers: Mapping[str, str],
        query: Mapping[str, str],
        *,
        over_http: bool,
    ) -> None:
        self.headers, self.query = dict(headers), dict(query)
        named = [*self.headers.items(), *self.query.items()]
        for name, value in named:
            _checked(value, f"default_headers or default_query[{name!r}]")
        for name in self.headers:
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or name.lower() in _OURS:
                raise ConfigError(f"default_headers can't set {name!r}")
        self._secrets = [value for name, value in named if SECRET.search(name)]
        if api_key is None:
            api_key = os.environ.get("VLLM_API_KEY") or ""
        roots = [endpoint.root for endpoint in endpoints]
        self._keys: dict[str, Key] = (
            {Endpoint.parse(url).root: key for url, key in api_key.items()}
            if isinstance(api_key, Mapping)
            else dict.fromkeys(roots, api_key)
        )
        if strangers := self._keys.keys() - set(roots):
            raise ConfigError(f"api_key names servers that base_url does not: {', '.join(sorted(strangers))}")
        if "authorization" in map(str.lower, self.headers):
            self._keys = {}  # said twice: the header is meant
        for key in filter(None, self._keys.values()):
            if not callable(key):
                _checked(key, "api_key")
        exposed = [endpoint for endpoint in endpoints if not (over_http or endpoint.is_private)]
        for endpoint in exposed:
            if self._keys.get(endpoint.root) or self._secrets:
                said = f"the key would go unencrypted to {endpoint.label}; use https, or pass send_key_over_http=True"
                raise ConfigError(f"{said} where the network in between is trusted")

    def __bool__(self) -> bool:
        return any(self._keys.values()) or bool(self._secrets)

    @property
    def has_secrets(self) -> bool:
        """Whether headers or query parameters seem to be secret, by their names."""
        return bool(self._secrets)

    def key(self, endpoint: Endpoint) -> str | None:
        """Find the key for a server; a function is asked each time."""
        key = self._keys.get(endpoint.root)
        if callable(key):
            try:
                key = key()
            except Exception as error:
                # Its words may hold a secret.
                said = f"api_key= is a function, which failed: {type(error).__name__}"
                raise BackendUnavailable(said, endpoint=endpoint.label, attempts=0) from error
            _checked(key, "what the function api_key= gave")
        return key or None

    def scrub(self, text: bytes, key: str | None) -> bytes:
        """Leave secrets out of what a server says: some gateways repeat the key that they refuse."""
        for secret in _plausible([key or "", *self._secrets]):
            text = text.replace(secret.encode(), b"[key]")
        return text


def portable(name: str, function: object) -> Any:
    """Give a function that a pickle can carry, by its name; ConfigError for one that another process can't find."""
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(f"{name} can't go to another process: pass a function that a module defines") from error
    return function


def _plausible(secrets: Iterable[str]) -> list[str]:
    return [secret for secret in secrets if len(secret) >= 8]  # a short one ("k", "0") is in words and numbers


def _checked(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be text, got {type(value).__name__}")
    if not (value.isascii() and (value.isprintable() and value == value.strip())):
        raise ConfigError(f"{name} has characters that no HTTP header can carry; was a line break pasted with it?")
