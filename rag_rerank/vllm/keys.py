"""What lets requests in: keys, and headers and query parameters such as gateways want."""

import functools
import html
import inspect
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import takewhile
from typing import Any, ParamSpec, TypeVar

from rag_rerank.errors import BackendUnavailable, ConfigError
from rag_rerank.vllm.endpoint import Endpoint

P = ParamSpec("P")
E = TypeVar("E", bound=BaseException)
Key = str | Callable[[], str]
SECRET = re.compile("key|token|secret|passw|auth|credential|cookie", re.IGNORECASE)  # names of what gives access
_OURS = {"content-type", "content-length", "accept-encoding", "transfer-encoding", "host"}


class Keys:
    """The keys of some servers, by address, and what goes with each request. A pickle carries nothing secret.

    The key None is read from the environment (`is_default`); an empty one is not sent. Raises ConfigError where no HTTP
    header can carry it, or where it would go unencrypted to another machine without `over_http`.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        api_key: Key | Mapping[str, Key] | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        *,
        over_http: bool = False,
    ) -> None:
        named = [*(headers or {}).items(), *(query or {}).items()]
        for name, value in named:
            _checked(name, "a name in default_headers or default_query")
            _checked(value, f"default_headers or default_query[{name!r}]")
        for name in headers or ():
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or name.lower() in _OURS:
                raise ConfigError(f"default_headers can't set {name!r}")
        self.headers = {name.lower(): value for name, value in (headers or {}).items()}
        self.query = dict(query or {})
        self._secrets = [value for name, value in named if SECRET.search(name)]
        self._remade_by = list(endpoints), api_key if inspect.isfunction(api_key) else None, over_http
        self.is_default = api_key is None
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
        if "authorization" in self.headers:
            self._keys = {}  # said twice: the header is meant
        for key in filter(None, self._keys.values()):
            if not callable(key):
                _checked(key, "api_key")
        for endpoint in endpoints:
            if (self._keys.get(endpoint.root) or self._secrets) and not (over_http or endpoint.is_private):
                said = f"the key would go unencrypted to {endpoint.label}; use https, or pass send_key_over_http=True"
                raise ConfigError(f"{said} where the network in between is trusted")

    def __bool__(self) -> bool:
        return any(self._keys.values()) or bool(self._secrets)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._secrets:
            said = "default_headers or default_query hold a secret, by its name, which no pickle carries"
            raise ConfigError(f"{said}; make the scorer in each process, or have http_client= send it")
        endpoints, function, over_http = self._remade_by
        remake = functools.partial(Keys, headers=self.headers, query=self.query, over_http=over_http)
        return remake, (endpoints, portable("api_key", function))

    def sign(self, headers: MutableMapping[str, str], endpoint: Endpoint) -> None:
        """Put the key for a server among a request's headers; a function is asked for it each time."""
        key = self._keys.get(endpoint.root)
        if callable(key):
            try:
                key = key()
            except Exception as error:
                # Its words may hold a secret.
                said = f"api_key= is a function, which failed: {type(error).__name__}"
                raise BackendUnavailable(said, endpoint=endpoint.label, attempts=0) from error
            _checked(key, "what the function api_key= gave")
        if key:
            headers["authorization"] = f"Bearer {key}"

    def scrub(self, text: str, headers: Mapping[str, str]) -> str:
        """Leave secrets out of what a server says: some gateways repeat the key that they refuse."""
        secrets = [*self._secrets, *(value for name, value in headers.items() if SECRET.search(name))]
        for secret in " ".join(secrets).split():  # what follows Bearer, and without the end of a key's file
            if len(secret) >= 8:  # a short one ("k", "0") is in words and numbers
                text = re.sub("".join(map(_spellings, secret)), "[key]", text)
        return text


def guarded(make: Callable[P, None]) -> Callable[P, None]:
    """Keep what a function is given out of its errors, see `without_frames`."""

    @functools.wraps(make)
    def guarding(*arguments: P.args, **settings: P.kwargs) -> None:
        handled = sys.exception()
        try:
            make(*arguments, **settings)
        except (ConfigError, TypeError) as error:
            del arguments, settings
            raise without_frames(error, handled) from error.__cause__

    return guarding


def without_frames(error: E, handled: BaseException | None) -> E:
    """Drop the frames of an error and of what it came from: views of local variables would show keys.

    Not those of what the caller was handling: that is his own.
    """
    for each in takewhile(lambda each: each is not handled, causes(error)):
        each.__traceback__ = None
    return error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """List an error and what it was raised from, all the way down."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _spellings(letter: str) -> str:
    """Make a pattern of the ways in which JSON, URLs and HTML write a letter of a key."""
    if letter.isalnum():
        return letter
    code, named = ord(letter), re.escape(html.escape(letter))
    plain = rf"{named}|\\{{0,32}}{re.escape(letter)}"  # of any number of backslashes, 64 kB would take 10 s
    return rf"(?:{plain}|(?:\\{{1,32}}u00|%|%25)(?i:{code:02x})|&#(?:{code}|[xX](?i:{code:x}));)"


def portable(name: str, function: object) -> Any:
    """Give a function that a pickle can carry, by its name; ConfigError for one that another process can't find."""
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(f"{name} can't go to another process: pass a function that a module defines") from error
    return function


def _checked(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be text, got {type(value).__name__}")
    if not (value.isascii() and (value.isprintable() and value == value.strip())):
        raise ConfigError(f"{name} has characters that no HTTP header can carry; was a line break pasted with it?")
