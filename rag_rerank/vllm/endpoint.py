"""Where a server is: what users paste as its address, and the URLs made of it."""

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from rag_rerank.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A vLLM server's address."""

    root: str  # scheme, host, port and any path before /v1; no slash at the end
    label: str  # host:port, which is how errors name the server

    @classmethod
    def parse(cls, base_url: str) -> "Endpoint":
        """Read an address; ``/``, ``/v1``, ``/score`` or ``/rerank`` at its end is dropped. Never echoes a password."""
        if not isinstance(base_url, str):
            raise ConfigError(f"base_url must be a string, got {type(base_url).__name__}")
        example = "such as http://localhost:8000"
        try:
            parts = urlsplit(base_url.strip())
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"base_url is not a URL ({error}); pass one {example}") from None
        if "@" in parts.netloc:
            raise ConfigError("base_url holds a user name or password; pass the key as api_key= or in VLLM_API_KEY")
        if parts.scheme not in ("http", "https"):
            raise ConfigError(f"base_url must begin with http:// or https://, got {base_url!r}; pass one {example}")
        if not host:
            raise ConfigError(f"base_url names no host: {base_url!r}; pass one {example}")
        if parts.query or parts.fragment:
            raise ConfigError("base_url must not have a query or fragment (what follows ? or #)")
        path = parts.path.rstrip("/").removesuffix("/score").removesuffix("/rerank").removesuffix("/v1").rstrip("/")
        shown = f"[{host}]" if ":" in host else host
        label = f"{shown}:{port or (443 if parts.scheme == 'https' else 80)}"
        return cls(root=f"{parts.scheme}://{parts.netloc}{path}", label=label)

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine."""
        host = urlsplit(self.root).hostname or ""
        if host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:  # another machine's name
            return False

    @property
    def is_private(self) -> bool:
        """Whether nobody on the way can read what is sent: it is encrypted, or stays on this machine."""
        return self.root.startswith("https") or self.is_loopback
