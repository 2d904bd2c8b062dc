"""Linear layers whose weights lie in memory as the CPU's matrix kernels want them.

oneDNN has a layout of its own, made once here instead of call after call: bfloat16 layers then run 1.1 to 1.3 times as
fast (Intel AMX), float32 layers 2.3 times on AMD, where MKL uses AVX2 only, with the same numerics. The operator is
torch.compile's own and private to torch, hence the test before it is used.
"""

import functools
from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.activations import GELUActivation


class PackedLinear(torch.nn.Module):
    """A copy of an ``nn.Linear`` for inference on the CPU, best with calls of so many rows.

    The activation, ``"gelu"`` or ``"none"``, is applied to each output while it is still in the processor.
    """

    def __init__(self, layer: torch.nn.Linear, rows: int, activation: str = "none") -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features  # some models ask for them
        # The kernel reads a bias as if it were contiguous, whether it is or not.
        self.bias = None if layer.bias is None else layer.bias.detach().contiguous()
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().contiguous(), rows)
        self._activation = activation

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer, and the activation after it."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, self._activation, [], "none")
        return out


def pack(model: torch.nn.Module, rows: int) -> None:
    """Replace a model's linear layers, and activations behind them that are plain GELU, where this torch can."""
    first = next(model.parameters())
    if first.device.type == "cpu" and _works(first.dtype):
        with torch.inference_mode():
            _pack(model, rows)


# By their weights: a layer that is used in several places stays one, and so do those of a copy that shares weights.
_packed: MutableMapping[Tensor, dict[object, PackedLinear]] = WeakTensorKeyDictionary()


def _pack(module: torch.nn.Module, rows: int) -> None:
    # BERT and its kin: dense, then intermediate_act_fn. Exact GELU only, for that is what the kernel has.
    dense, then = getattr(module, "dense", None), getattr(module, "intermediate_act_fn", None)
    fused = type(dense) is torch.nn.Linear and _is_exact_gelu(then)
    for name, child in list(module._modules.items()):
        if type(child) is torch.nn.Linear and min(child.in_features, child.out_features) >= 64:  # small gains nothing
            activation = "gelu" if fused and name == "dense" else "none"
            made, key = _packed.setdefault(child.weight, {}), (id(child.bias), rows, activation)
            if key not in made:
                made[key] = PackedLinear(child, rows, activation)
            setattr(module, name, made[key])
        elif child is not None:
            _pack(child, rows)
    if fused and isinstance(module.dense, PackedLinear):
        module.intermediate_act_fn = torch.nn.Identity()


def _is_exact_gelu(activation: object) -> bool:
    if isinstance(activation, GELUActivation):
        return activation.act is gelu
    return isinstance(activation, torch.nn.GELU) and activation.approximate == "none"


@functools.cache
def _works(dtype: torch.dtype) -> bool:
    """Tell whether the packed layer computes here what the plain one does."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    # A generator of its own: loading a model must not change the caller's random numbers.
    numbers = torch.randn(3, 96, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, inputs, bias = numbers[0], numbers[1], numbers[2, :, 0]
    try:
        with torch.inference_mode():
            layer = torch.nn.Linear(64, 96, device="meta")  # draws no random numbers
            layer.weight, layer.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
            plain = linear(inputs, weight, bias)
            expected = torch.stack((plain, gelu(plain)))
            got = torch.stack((PackedLinear(layer, 96)(inputs), PackedLinear(layer, 96, "gelu")(inputs)))
    except (AttributeError, RuntimeError, TypeError):
        return False
    near = 0.05 if dtype == torch.bfloat16 else 1e-5
    return torch.allclose(got, expected, rtol=near, atol=near)
