"""How fast this machine could be: the best rate at which it multiplies matrices of a model's sizes.

    .venv/bin/python -m benchmarks.roofline FOLDER     # {"float32": GFLOP/s, "bfloat16": GFLOP/s} as JSON

The best over torch's linear layer as it is and with weights reordered for oneDNN, over the sizes of the model's own
layers, at 2,048 and 4,096 rows. What a call needs is counted without padding: linear layers and attention over the
tokens that there are. A decoder's prompt begins alike for all documents of a query, and that beginning is counted
once; nothing else is left out, so that a contestant that saves in the last layer may pass 100 %.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.texts import Call
from rag_rerank.template import Template

ROWS = (2048, 4096)
SECONDS = 0.4  # for one size and kernel


@dataclass(frozen=True, slots=True)
class Work:
    """What a model computes for a token.

    Attributes:
        linears: Inputs and outputs of each linear layer of a block.
        blocks: How many there are.
        attention: Heads times their size.
        causal: Whether a token sees only those before it.
        windows: How far a token sees to either side, for each block; None without a limit.
    """

    linears: tuple[tuple[int, int], ...]
    blocks: int
    attention: int
    causal: bool
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, folder: Path) -> "Work":
        """From a folder's config.json."""
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        hidden, inner, blocks = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        own = config.get("head_dim") or hidden // config["num_attention_heads"]
        queries = config["num_attention_heads"] * own
        keys = config.get("num_key_value_heads", config["num_attention_heads"]) * own
        gated = config["model_type"] in {"modernbert", "qwen3"}  # two inner layers, one of which gates the other
        every, reach = config.get("global_attn_every_n_layers", 1), config.get("local_attention", 0) // 2
        return cls(
            linears=(
                (hidden, queries + 2 * keys),
                (queries, hidden),
                (hidden, 2 * inner if gated else inner),
                (inner, hidden),
            ),
            blocks=blocks,
            attention=queries,
            causal=config["model_type"] == "qwen3",
            windows=tuple(reach if block % every else None for block in range(blocks)),
        )

    def operations(self, tokens: int, shared: int = 0) -> int:
        """Floating-point operations for a sequence of so many tokens, of which the first `shared` are known already."""
        new = tokens - shared
        linear = 2 * new * self.blocks * sum(inputs * outputs for inputs, outputs in self.linears)
        seen = 0
        for window in self.windows:
            if self.causal:
                seen += (tokens * (tokens + 1) - shared * (shared + 1)) // 2
            elif window is None:
                seen += tokens * tokens
            else:
                seen += sum(min(at + window, tokens - 1) - max(at - window, 0) + 1 for at in range(tokens))
        return linear + 4 * self.attention * seen


class Counter:
    """Counts the operations of calls.

    Args:
        folder: The model.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._work = Work.of(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self._limit: int = settings["model_max_length"]
        self._template = Template.load("qwen3-reranker") if self._work.causal else None

    def operations(self, call: Call) -> tuple[int, int]:
        """Operations and tokens of a call."""
        operations = tokens = 0
        for query, texts in zip(call.queries, call.documents, strict=True):
            rows, shared = self._rows(query, texts)
            operations += self._work.operations(shared) if shared else 0
            operations += sum(self._work.operations(row, shared) for row in rows)
            tokens += shared + sum(row - shared for row in rows)
        return operations, tokens

    def _rows(self, query: str, texts: Sequence[str]) -> tuple[list[int], int]:
        """Each pair's length in tokens, and how many all of them begin with."""
        if self._template is None:
            pairs = self._tokenizer.encode_batch([(query, text) for text in texts])
            return [min(len(pair.ids), self._limit) for pair in pairs], 0
        prompts = [self._template.render(query, text, {}) for text in texts]
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(prompts)]
        return [len(row) for row in rows], common(rows) if len(rows) > 1 else 0


def common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return next((at for at, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))


def best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of as many runs as fit in `SECONDS`."""
    run()
    fastest, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        began = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def measure(folder: Path) -> dict[str, float]:
    """GFLOP/s by number format."""
    import torch

    rates: dict[str, float] = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            for inputs, outputs in sorted(set(Work.of(folder).linears)):
                weight, bias = torch.randn(outputs, inputs).to(dtype) * 0.05, torch.randn(outputs).to(dtype)
                for rows in ROWS:
                    states = torch.randn(rows, inputs).to(dtype)
                    runs = [lambda x=states, w=weight, b=bias: torch.nn.functional.linear(x, w, b)]
                    if torch.backends.mkldnn.is_available():
                        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
                        runs.append(
                            lambda x=states, w=packed, b=bias: torch.ops.mkldnn._linear_pointwise(
                                x, w, b, "none", [], ""
                            )
                        )
                    rate = 2 * rows * inputs * outputs / min(map(best, runs)) / 1e9
                    rates[name] = max(rates.get(name, 0.0), rate)
    return rates


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(Path(sys.argv[1]))) + "\n")
