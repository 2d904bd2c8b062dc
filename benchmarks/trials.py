"""What was tried for speed on the CPU and is not in the package, beside what is: int8 and torch.compile.

    .venv/bin/python -m benchmarks.trials [--model minilm] [--rounds 5]

Same weights, same batches, interleaved; ratios are per round against the package's own float32. Agreement is Kendall's
tau to float32 over all pairs of a round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.models import folder as folder_of
from benchmarks.report import kendall
from benchmarks.texts import Load, Texts
from rag_rerank import LocalScorer
from rag_rerank.local.loading import load
from rag_rerank.local.models.model import ScoreType
from rag_rerank.local.transformer import linear
from rag_rerank.local.transformer.batching import Batching, TokenSequence
from rag_rerank.local.transformer.transformer import Padded

Run = Callable[[list[TokenSequence]], Tensor]


class Int8Linear(torch.nn.Module):
    """Weights in int8 with a scale per row, inputs and products in bfloat16: torch's own weight-only kernel."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        self.scale = (weight.abs().amax(dim=1) / 127).bfloat16()
        self.weight = (weight / self.scale.float().unsqueeze(1)).round().clamp(-128, 127).to(torch.int8)
        self.bias = layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.flatten(0, -2)
        outputs = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        return (outputs + self.bias).unflatten(0, inputs.shape[:-1])


def weight_only(module: torch.nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is torch.nn.Linear and child.out_features >= 64:
            setattr(module, name, Int8Linear(child))
        else:
            weight_only(child)


def contestants(folder: str, console: Console) -> dict[str, Run]:
    """How each runs a batch."""

    def ours(dtype: str, *, packed: bool = True) -> ScoreType:
        works = linear._works
        linear._works = works if packed else lambda _: False
        try:
            return load(LocalScorer(folder, dtype=dtype)._settings).score_type
        finally:
            linear._works = works

    def dynamic() -> Run:
        model = ours("float32", packed=False)
        torch.ao.quantization.quantize_dynamic(
            model.transformer.model.encoder, {torch.nn.Linear}, dtype=torch.qint8, inplace=True
        )
        return model.run

    def only_weights() -> Run:
        model = ours("bfloat16", packed=False)
        weight_only(model.transformer.model.encoder)
        return model.run

    def compiled() -> Run:
        whole = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).eval()
        padded = Padded(whole, AutoTokenizer.from_pretrained(folder).pad_token_id, Batching(2048))
        forward = torch.compile(whole, dynamic=True)

        @torch.inference_mode()
        def run(sequences: list[TokenSequence]) -> Tensor:
            return forward(**padded.inputs(sequences)).logits.float()

        return run

    makers = {
        "float32": lambda: ours("float32").run,
        "float32, plain nn.Linear": lambda: ours("float32", packed=False).run,
        "bfloat16": lambda: ours("bfloat16").run,
        "bfloat16, plain nn.Linear": lambda: ours("bfloat16", packed=False).run,
        "int8 dynamic (inputs and weights)": dynamic,
        "int8 weights, bfloat16 inputs": only_weights,
        "bfloat16, padded, torch.compile": compiled,
    }
    runs: dict[str, Run] = {}
    for name, make in makers.items():
        try:
            runs[name] = make()
        except Exception as error:  # noqa: BLE001 - a trial that fails is a result
            console.print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    console = Console(width=120)
    folder = str(folder_of(arguments.model))
    runs = contestants(folder, console)
    model = load(LocalScorer(folder, dtype="float32")._settings)
    calls = Texts("passages").calls(Load(1, 100))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    taus: dict[str, list[float]] = {name: [] for name in runs}
    first: dict[str, float] = {}
    names = list(runs)
    for number in track(range(arguments.rounds + 1), "Rounds", console=console, transient=True):
        call = next(calls)
        sequences = list(model.inputs(call.queries, call.documents[0]).sequences)
        sequences.sort(key=lambda sequence: -len(sequence.ids))
        cut = model.score_type.transformer.batches(sequences, 2048)
        scores: dict[str, list[float]] = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            outputs = [runs[name]([sequences[position] for position in batch]) for batch in cut]
            took = time.perf_counter() - began
            scores[name] = torch.cat(outputs)[:, 0].tolist()
            if number:
                seconds[name].append(took)
            else:
                first[name] = took
        for name, own in scores.items():
            taus[name].append(kendall(own, scores["float32"]))
    table = Table(title=f"{arguments.model}: 1 query x 100 passages, {arguments.rounds} rounds")
    for column in ("", "p50 ms", "times float32 [min-max]", "tau", "first call s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, times in seconds.items():
        ratios = [base / own for base, own in zip(seconds["float32"], times, strict=True)]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
        tau = f"{statistics.mean(taus[name]):.3f}"
        table.add_row(name, f"{statistics.median(times) * 1000:.0f}", spread, tau, f"{first[name]:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
