"""The device, number format and batch sizes of a model, where the caller leaves them open."""

import torch

from rag_rerank.errors import ConfigError
from rag_rerank.local.engine import workers
from rag_rerank.local.transformer.batching import Batching


def choose_batching(device: torch.device) -> Batching:
    """Choose batch sizes for a device. The figures for others than CPUs are guesses on the safe side, not measured."""
    if device.type == "cpu":
        cores = torch.get_num_threads()
        # A core's matrix kernels run at half speed below about 500 rows, and measured alike from 1,000 to 4,000. Beyond
        # 32 MB a buffer is mapped anew for each batch (282,000 page faults a call, 1.7 times slower): 16,384 in all.
        if workers.available():
            return Batching(max(512, min(2048, 16_384 // cores)), parallel=cores)
        return Batching(min(max(2048, 1024 * cores), 16_384))
    return Batching(16_384 if device.type == "mps" else 65_536)


def choose_device(name: str | None) -> torch.device:
    """Find the device called `name`, or the first there is of cuda, mps and cpu; ConfigError where it can't be used."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} can't be used: {reason}. device=None takes the best there is.") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Find the torch dtype called `name`; for ``"auto"`` the fastest that the device computes natively.

    Emulated bfloat16 is slower than float32, hence the look at the processor: with AVX512_BF16 or AMX it runs a
    MiniLM cross-encoder about twice as fast, at Kendall tau 0.99 to the float32 ranking.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    # torch.cpu.get_capabilities appeared in torch 2.11; without it we can't know, and float32 is always right.
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return torch.bfloat16 if known.get("avx512_bf16") or known.get("amx_bf16") else torch.float32
