"""What lets requests in: keys, and headers and query parameters such as gateways want."""

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

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
        for name, value in [*self.headers.items(), *self.query.items()]:
            if not (isinstance(name, str) and isinstance(value, str)):
                raise ConfigError("default_headers and default_query take names and values that are text")
        for name, value in self.headers.items():
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or name.lower() in _OURS:
                raise ConfigError(f"default_headers can't set {name!r}")
            _checked(value, f"default_headers[{name!r}]")
        if api_key is None:
            api_key = os.environ.get("VLLM_API_KEY") or ""
        if isinstance(api_key, Mapping):
            self._keys = {Endpoint.parse(url).root: key for url, key in api_key.items()}
            if strangers := self._keys.keys() - {endpoint.root for endpoint in endpoints}:
                raise ConfigError(f"api_key names servers that base_url does not: {', '.join(sorted(strangers))}")
        else:
            self._keys = {endpoint.root: api_key for endpoint in endpoints}
        if any(name.lower() == "authorization" for name in self.headers):
            self._keys = {}  # said twice: the header is meant
        for key in self._keys.values():
            if not callable(key):
                _checked(key, "api_key")
        self._secrets = [value for name, value in [*self.headers.items(), *self.query.items()] if SECRET.search(name)]
        for endpoint in () if over_http else endpoints:
            if (self._keys.get(endpoint.root) or self._secrets) and not endpoint.is_private:
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


def is_portable(key: object) -> bool:
    """Tell whether a pickle may carry it: a function goes by its name, anything else might hold a key."""
    return inspect.isfunction(key)


def _plausible(secrets: Iterable[str]) -> list[str]:
    return [secret for secret in secrets if len(secret) >= 8]  # a short one ("k", "0") is in words and numbers


def _checked(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be text, got {type(value).__name__}")
    if not (value.isascii() and (value.isprintable() and value == value.strip())):
        raise ConfigError(f"{name} has characters that no HTTP header can carry; was a line break pasted with it?")
