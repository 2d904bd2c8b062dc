"""Which proxy the environment names for a server: read here, so that what can't be used is told before a request."""

import importlib.util
import ipaddress
import os
import re
from urllib.parse import urlsplit
from urllib.request import getproxies

from rag_rerank.errors import ConfigError
from rag_rerank.vllm.endpoint import Endpoint


def proxy_for(endpoint: Endpoint) -> str | None:
    """Find the proxy's address for a server: none for this machine, nor for what NO_PROXY names.

    Raises:
        ConfigError: The variable that applies holds no proxy that can be used.
    """
    parts = urlsplit(endpoint.root)
    host = (parts.hostname or "").rstrip(".")
    proxies = getproxies()
    if endpoint.is_loopback or _is_excepted(host, endpoint.label, proxies.get("no", "")):
        return None
    kind = next((kind for kind in (parts.scheme, "all") if proxies.get(kind)), None)
    if kind is None:
        return None
    names = f"{kind}_proxy", f"{kind}_proxy".upper()
    name = next((name for name in names if name in os.environ), f"the system's {kind} proxy")
    proxy = proxies[kind] if "://" in proxies[kind] else f"http://{proxies[kind]}"
    try:
        address = urlsplit(proxy)
        usable = bool(address.hostname) and (address.port or 1) > 0
    except ValueError:
        usable = False
    remedy = f"Mend {name}, or name {host} in NO_PROXY"
    if not usable:
        raise ConfigError(f"{name} holds no proxy's address. {remedy}")
    if address.scheme not in ("http", "https", "socks5", "socks5h"):
        raise ConfigError(
            f"{name} asks for a proxy that speaks {address.scheme!r}; known are http and socks5. {remedy}"
        )
    if address.scheme.startswith("socks5") and importlib.util.find_spec("socksio") is None:
        raise ConfigError(f"{name} asks for a SOCKS proxy, which needs a package: pip install httpx[socks]. {remedy}")
    return proxy


def _is_excepted(host: str, label: str, exceptions: str) -> bool:
    """Tell whether NO_PROXY names a host, as curl reads it: by name or domain, address, network, or with its port."""
    for entry in re.split(r"[,\s]+", exceptions.lower()):
        named = entry.split("://")[-1]
        name = named.removeprefix("*").strip("[].")
        if entry == "*" or named == label or (name and f".{host}".endswith(f".{name}")):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False):
                return True
        except ValueError:  # a name
            continue
    return False
