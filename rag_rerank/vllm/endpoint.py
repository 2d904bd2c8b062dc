"""Where a server is: what users paste as its address, and the URLs made of it."""

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from rag_rerank.errors import ConfigError
from rag_rerank.vllm.wire import API, VLLM_SCORE, Form

_UNCLEAR = ("/score", "/rerank")  # a path of the API, or of a server that is below it


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server's address."""

    root: str  # scheme, host, port and any path before that of the API; no slash at the end
    label: str  # host:port, which is how errors name the server
    path: str = field(default="", compare=False)  # of the API, as far as the user has named it

    @classmethod
    def parse(cls, base_url: str) -> "Endpoint":
        """Read an address, which may end in ``/v1``, ``/v2``, ``/score`` or ``/rerank``. Never echoes a password."""
        if not isinstance(base_url, str):
            raise ConfigError(f"base_url must be a string, got {type(base_url).__name__}")
        example = "such as http://localhost:8000"
        if "@" in base_url:  # wherever: what is written wrongly is shown below, and a password may be in it
            raise ConfigError("base_url holds a user name or password; pass the key as api_key= or in VLLM_API_KEY")
        if "?" in base_url or "#" in base_url:
            raise ConfigError("base_url must not have a query or fragment (what follows ? or #)")
        try:
            parts = urlsplit(base_url.strip())
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"base_url is not a URL ({error}); pass one {example}") from None
        if parts.scheme not in ("http", "https"):
            raise ConfigError(f"base_url must begin with http:// or https://, got {base_url!r}; pass one {example}")
        if not host:
            raise ConfigError(f"base_url names no host: {base_url!r}; pass one {example}")
        parsed = re.fullmatch(r"(.*?)((?:/v[12])?(?:/score|/rerank(?:ing)?)?)/*", parts.path)
        prefix, path = parsed.groups()  # type: ignore[union-attr]  # it matches anything
        if port == 0:
            raise ConfigError(f"base_url names port 0, on which no server is; pass one {example}")
        shown = f"[{host}]" if ":" in host else host
        label = f"{shown}:{port or (443 if parts.scheme == 'https' else 80)}"
        return cls(f"{parts.scheme}://{parts.netloc}{prefix.rstrip('/')}", label, path)

    def forms(self, endpoint: API | Literal["auto"]) -> list[Form]:
        """List how a server may be asked here, the likeliest first."""
        version = "/v2" if self.path.startswith("/v2") else "/v1"
        rerank = Form("rerank", self.path if "/rerank" in self.path else f"{version}/rerank")
        tei = Form("tei", "/rerank")
        below = [Form("score", f"{self.path}/v1/score")] if self.path in _UNCLEAR else []
        if endpoint != "auto":
            return {"score": [VLLM_SCORE, *below], "rerank": [rerank], "tei": [tei]}[endpoint]
        likely = [VLLM_SCORE, *below, rerank]
        likely = likely[::-1] if "/rerank" in self.path or version == "/v2" else likely
        others = [Form("rerank", path) for path in ("/v1/rerank", "/rerank", "/v2/rerank")]
        return list(dict.fromkeys([*likely, *others, tei]))

    def lists(self, endpoint: API | Literal["auto"]) -> list[str]:
        """List where a server may tell its models: most, below an unclear path, infinity, text-embeddings-inference."""
        below = [f"{self.path}/v1/models"] if self.path in _UNCLEAR else []
        return ["/v1/models", *below, *([] if endpoint == "score" else ["/models", "/info"])]

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine; 0.0.0.0, where vLLM says that it listens, leads here too."""
        host = (urlsplit(self.root).hostname or "").rstrip(".")
        if host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:  # another machine's name
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        return address.is_loopback or address.is_unspecified

    @property
    def is_private(self) -> bool:
        """Whether nobody on the way can read what is sent: it is encrypted, or stays on this machine."""
        return self.root.startswith("https") or self.is_loopback
