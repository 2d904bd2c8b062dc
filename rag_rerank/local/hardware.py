"""The device, number format and batch sizes of a model, where the caller leaves them open, and cores for threads."""

import contextlib
import ctypes
import threading
from pathlib import Path

import torch

from rag_rerank.errors import ConfigError
from rag_rerank.local.transformer.batching import Batching


def choose_batching(device: torch.device) -> Batching:
    """Choose batch sizes for a device. The figures for others than CPUs are guesses on the safe side, not measured."""
    if device.type == "cpu":
        cores = torch.get_num_threads()
        # A core's matrix kernels run at half speed below about 500 rows, and measured alike from 1,000 to 4,000. Beyond
        # 32 MB a buffer is mapped anew for each batch (282,000 page faults a call, 1.7 times slower): 16,384 in all.
        if one_core_each():
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

    Hence the look at the processor. A MiniLM cross-encoder runs about twice as fast in bfloat16 as in float32 with AMX,
    and 1.5 times with AMD's AVX512_BF16 (Zen 5), at Kendall tau 0.99 to its ranking. With Intel's AVX512_BF16 alone (a
    Xeon's virtual machine without AMX) it took 1.3 to 1.8 times as long.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    # torch.cpu.get_capabilities appeared in torch 2.11; without it we can't know, and float32 is always right.
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    amd = known.get("sse4a") and known.get("avx512_bf16")  # no other maker's processors know SSE4a
    return torch.bfloat16 if known.get("amx_bf16") or amd else torch.float32


def one_core_each() -> bool:
    """Tell whether threads can be made to use one core each, and all others left as they are."""
    if torch.get_num_threads() < 2:
        return False
    before, inside = torch.get_num_threads(), []
    thread = threading.Thread(target=lambda: inside.append(use_one_core()))
    thread.start()
    thread.join()
    return inside == [True] and torch.get_num_threads() == before


def use_one_core() -> bool:
    """Make torch compute in the calling thread alone; True if that worked.

    ``torch.set_num_threads`` would do it for all threads that are started later, too, and for MKL in all there are. The
    OpenMP and MKL libraries behind it know a setting for the calling thread only.
    """
    torch.get_num_threads()  # torch sets a thread up when it first meets it: not after us, please
    for path in _openmp_libraries():
        try:
            ctypes.CDLL(path).omp_set_num_threads(1)
        except (OSError, AttributeError):
            continue
        if torch.get_num_threads() == 1:
            # MKL has its own setting. The C function: the name in lower case is Fortran's, which takes an address.
            with contextlib.suppress(OSError, AttributeError):  # a torch without MKL
                library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
                library.MKL_Set_Num_Threads_Local(1)
            return True
    return False


def _openmp_libraries() -> list[str]:
    """Find the OpenMP libraries that this process has loaded; on Linux, elsewhere there are none to be found."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if "/" in line)
    return [path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))]
