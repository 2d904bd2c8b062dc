"""Options that several commands have, and the scorer that they ask for."""

from typing import Annotated

import typer

from rag_rerank import ConfigError, LocalScorer, LocalSettings, Scorer, VLLMScorer

ModelOption = Annotated[
    str | None, typer.Option(help=f"Hub id or folder ({LocalSettings.model} if none), or the name on the server.")
]
BaseURLOption = Annotated[
    list[str] | None,
    typer.Option(help="A vLLM server; may be repeated for several. The key is read from VLLM_API_KEY."),
]
HostOption = Annotated[str | None, typer.Option(help="The vLLM server's host, instead of --base-url.")]
PortOption = Annotated[int | None, typer.Option(help="The vLLM server's port, instead of --base-url.")]
DeviceOption = Annotated[str | None, typer.Option(help="Local only: cuda, cuda:1, mps, cpu.")]
DtypeOption = Annotated[str, typer.Option(help="Local only: auto, float32, bfloat16, float16.")]
LogitsOption = Annotated[bool, typer.Option("--logits", help="Raw logits instead of the model's own scale.")]
JSONOption = Annotated[bool, typer.Option("--json", help="JSON Lines instead of a table.")]
KeyOverHTTPOption = Annotated[
    bool, typer.Option("--send-key-over-http", help="Allow the key to be sent unencrypted to another machine.")
]


def make_scorer(
    model: str | None,
    base_url: list[str] | None,
    host: str | None,
    port: int | None,
    device: str | None,
    dtype: str,
    logits: bool,
    send_key_over_http: bool = False,
) -> Scorer:
    """Make the scorer that the options ask for: remote as soon as one of them says where."""
    use_activation = False if logits else None
    if base_url and (host is not None or port is not None):
        raise ConfigError("pass either --base-url or --host and --port")
    if host is not None or port is not None:
        base_url = [f"http://{host or 'localhost'}:{port or 8000}"]
    if base_url:
        if device is not None or dtype != "auto":
            raise ConfigError("--device and --dtype are for local models; a server has chosen its own")
        return VLLMScorer(base_url, model=model, use_activation=use_activation, send_key_over_http=send_key_over_http)
    return LocalScorer(
        model or LocalSettings.model,
        device=device,
        dtype=dtype,  # type: ignore[arg-type]  # checked by LocalScorer
        use_activation=use_activation,
    )
