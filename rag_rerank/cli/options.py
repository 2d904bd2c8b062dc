"""Options that several commands have, and the scorer that they ask for."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Option

from rag_rerank import BackendError, Calibrated, ConfigError, LocalScorer, LocalSettings, Scorer, VLLMScorer

DeviceOption = Annotated[str | None, Option(help="Local only: cuda, cuda:1, mps, cpu.")]
DtypeOption = Annotated[str, Option(help="Local only: auto, float32, bfloat16, float16.")]
KeyOverHTTPOption = Annotated[
    bool, Option("--send-key-over-http", help="Allow the key to be sent unencrypted to another machine.")
]
EndpointOption = Annotated[
    str, Option(help="How the server is asked: score (vLLM), rerank (most others), tei, or auto, which finds out.")
]
_MODEL_HELP = f"Hub id or folder ({LocalSettings.model} if none), or the name on the server."
_HEADER_HELP = 'A header for a server, such as "X-Tenant: search"; may be repeated.'
_URL_HELP = "A vLLM server; may be repeated for several. The key is read from VLLM_API_KEY."


@dataclass(frozen=True, slots=True)
class ScorerOptions:
    """The options that say what scores, in the order of ``--help``."""

    model: Annotated[str | None, Option(help=_MODEL_HELP)] = None
    base_url: Annotated[list[str] | None, Option(help=_URL_HELP)] = None
    host: Annotated[str | None, Option(help="The vLLM server's host, instead of --base-url.")] = None
    port: Annotated[int | None, Option(min=1, max=65535, help="The vLLM server's port, instead of --base-url.")] = None
    endpoint: EndpointOption = "score"
    device: DeviceOption = None
    dtype: DtypeOption = "auto"
    logits: Annotated[bool, Option("--logits", help="Raw logits instead of the model's own scale.")] = False
    send_key_over_http: KeyOverHTTPOption = False
    header: Annotated[list[str] | None, Option(help=_HEADER_HELP)] = None
    calibration: Annotated[Path | None, Option(help="A file of rag-rerank calibrate, for probabilities.")] = None

    def make(self) -> Scorer:
        """Make the scorer that they ask for: remote as soon as one of them says where."""
        scorer = self._make()
        return scorer if self.calibration is None else Calibrated(scorer, self.calibration)

    def _make(self) -> Scorer:
        use_activation = False if self.logits else None
        urls, names_host = self.base_url, self.host is not None or self.port is not None
        if urls and names_host:
            raise ConfigError("pass either --base-url or --host and --port")
        if names_host:
            urls = [f"http://{self.host or 'localhost'}:{self.port or 8000}"]
        if not urls and self.endpoint != "score":
            raise ConfigError("--endpoint goes with a server: pass --base-url")
        if not urls:
            model, dtype = self.model or LocalSettings.model, self.dtype
            return LocalScorer(model, device=self.device, dtype=dtype, use_activation=use_activation)  # type: ignore[arg-type]  # checked there
        if self.device is not None or self.dtype != "auto":
            raise ConfigError("--device and --dtype are for local models; a server has chosen its own")
        return VLLMScorer(
            urls,
            model=self.model,
            endpoint=self.endpoint,  # type: ignore[arg-type]  # checked there
            use_activation=use_activation,
            send_key_over_http=self.send_key_over_http,
            default_headers=dict(map(_header, self.header or ())),
        )


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon:
        raise ConfigError("--header takes a name and a value: --header 'Name: value'")
    return name.strip(), value.strip()


def console() -> Console:
    """Make a console on stdout whose tables are cut to a terminal's width, but not where they are piped or kept."""
    return Console(highlight=False, width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 1000)


@contextmanager
def said_what_is_kept(kept: Callable[[], str]) -> Iterator[None]:
    """Say what is kept for the next run, where this one ends early; after Ctrl-C with exit code 130, as shells do."""
    try:
        yield
    except (KeyboardInterrupt, BackendError, OSError) as error:
        sys.stderr.write(kept())
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(130) from None
        raise


def takes_scorer(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of `ScorerOptions` but those left out as options, instead of its argument `chosen`."""
    offered = [each for name, each in inspect.signature(ScorerOptions).parameters.items() if name not in left_out]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def flat(**given: Any) -> None:
            command(chosen=ScorerOptions(**{each.name: given.pop(each.name) for each in offered}), **given)

        signature = inspect.signature(command)
        own = (offered if each.name == "chosen" else [each] for each in signature.parameters.values())
        flat.__signature__ = signature.replace(parameters=list(chain(*own)))  # type: ignore[attr-defined]
        return flat

    return decorate
