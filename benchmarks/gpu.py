"""What a GPU has to show, for a machine that has one: one script, about ten minutes.

    .venv/bin/python -m benchmarks.gpu                  # on cuda
    .venv/bin/python -m benchmarks.gpu --device cpu     # a dry run: the same on few texts and small models

Four parts, each a table; what fails is a line, not the end. Right: the scores of small models, with heads of 32 to 256
numbers, windows and soft caps, beside those of plain transformers for one pair at a time in float32 on the CPU. Fast:
pairs per second of three shapes beside sentence-transformers and a loop of plain transformers with its fastest
attention, and how much of the device's best rate that is. Steady: waits for the device in a call, and whether another
device than the one that was asked for is used. Tested: tests/local, on the device.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.models import CACHE, ROOT, folder
from benchmarks.roofline import Counter, best
from benchmarks.texts import Call, Texts
from rag_rerank import LocalScorer
from rag_rerank.embedded import minilm_folder

QWEN: dict[str, Any] = {"template": "qwen3-reranker", "classifier_tokens": ("no", "yes")}
ROUNDS, DEPTH = 5, 1000  # calls, and documents of each


def small_models(root: Path) -> Iterator[tuple[str, Path, bool]]:
    """Save classifiers of two layers, with random weights: what is special, the folder, whether it is a decoder."""
    import transformers as t
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    common = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 1}
    common |= {"pad_token_id": tokenizer.pad_token_id, "intermediate_size": 256}
    decoder = common | {"hidden_size": 128, "num_key_value_heads": 2}
    made: list[tuple[str, Any, Any]] = []
    for size in (32, 64, 80, 96, 128, 256):
        bert = t.BertConfig(**common, hidden_size=4 * size)
        qwen = t.Qwen3Config(**decoder, head_dim=size)
        made.append((f"BERT, heads of {size}", t.BertForSequenceClassification, bert))
        made.append((f"Qwen3, heads of {size}", t.Qwen3ForSequenceClassification, qwen))
    capped = {"head_dim": 256, "attn_logit_softcapping": 5.0, "sliding_window": 32, "query_pre_attn_scalar": 256}
    made += [
        ("Mistral, window", t.MistralForSequenceClassification, t.MistralConfig(**decoder, sliding_window=32)),
        ("Gemma 2, window, soft cap", t.Gemma2ForSequenceClassification, t.Gemma2Config(**decoder, **capped)),
        (
            "ModernBERT, window",
            t.ModernBertForSequenceClassification,
            t.ModernBertConfig(**common, hidden_size=256, local_attention=32, global_attn_every_n_layers=2),
        ),
    ]
    for name, kind, config in made:
        path = root / name.replace(" ", "-")
        torch.manual_seed(0)
        kind(config).eval().save_pretrained(path)
        tokenizer.save_pretrained(path)
        yield name, path, "BERT" not in name


def alone(path: Path, query: str, documents: Sequence[str], device: str, dtype: str) -> torch.Tensor:
    """Score by plain transformers, one pair at a time: logits."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    loaded = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    model = loaded.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        pairs = [tokenizer(query, text, truncation=True, max_length=256, return_tensors="pt") for text in documents]
        return torch.cat([model(**pair.to(device)).logits.flatten().float().cpu() for pair in pairs])


def right(device: str, texts: Texts) -> Table:
    """Compare scores with those of plain transformers in float32 on the CPU; so are its own, whose rounding is fair."""
    title = "Right: largest difference, as a share of the scores' spread"
    table = Table("model", "dtype", "path", "rag_rerank", "transformers", title=title)
    query, documents = texts.questions[0], [*list(texts.documents.values())[:11], "a word"]
    with tempfile.TemporaryDirectory() as temporary:
        for name, path, is_decoder in small_models(Path(temporary)):
            expected = alone(path, query, documents, "cpu", "float32")
            for dtype in ("float32", "bfloat16", "float16"):
                options: dict[str, Any] = {"template": None} if is_decoder else {}
                cells = [name, dtype]
                try:
                    with LocalScorer(
                        path, device=device, dtype=dtype, use_activation=False, max_length=256, **options
                    ) as scorer:
                        made = (
                            torch.tensor(scorer.score(query, documents)),
                            alone(path, query, documents, device, dtype),
                        )
                        off = [float((each - expected).abs().max() / expected.std()) for each in made]
                        cells += [scorer.proof().path, *(f"{each:.1e}" for each in off)]
                except Exception as error:  # noqa: BLE001 - a line of the table
                    cells += ["", str(error)[:60], ""]
                table.add_row(*cells)
    return table


def whole(shape: str, **sizes: int) -> Path:
    """Save a model of a shape's kind with other sizes and random weights, once."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    path = CACHE / f"{shape}-whole"
    if not path.exists():
        values = AutoConfig.from_pretrained(folder(shape)).to_dict()
        values.pop("layer_types", None)  # of as many layers as it has
        config = AutoConfig.for_model(**values | sizes)
        auto: Any = (
            AutoModelForCausalLM if "Causal" in values["architectures"][0] else AutoModelForSequenceClassification
        )
        unfinished = path.with_name(f"{path.name}.unfinished")
        torch.manual_seed(0)
        auto.from_config(config, dtype=torch.bfloat16).save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(folder(shape)).save_pretrained(unfinished)
        unfinished.rename(path)
    return path


def sentence_transformers(path: Path, device: str, batch_size: int) -> Callable[[Call], object]:
    """Load a cross-encoder as its users do, in bfloat16."""
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(path), device=device, model_kwargs={"dtype": torch.bfloat16})
    return lambda call: encoder.predict(
        [(call.queries[0], text) for text in call.documents[0]], batch_size=batch_size, show_progress_bar=False
    )


def plain(path: Path, device: str, causal: bool) -> Callable[[Call], object]:
    """Load by transformers, in bfloat16, with its fastest attention; batches of 64, longest first."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from rag_rerank.template import Template

    template = Template.load("qwen3-reranker")
    auto: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left" if causal else "right")
    for attention in ("flash_attention_2", "sdpa"):  # the first where its package is there
        with suppress(ImportError, ValueError):
            model = auto.from_pretrained(path, dtype=torch.bfloat16, attn_implementation=attention).to(device).eval()
            break

    @torch.inference_mode()
    def score(call: Call) -> None:
        query, texts = call.queries[0], sorted(call.documents[0], key=len, reverse=True)
        for start in range(0, len(texts), 64):
            part = texts[start : start + 64]
            prompts = [template.render(query, text) for text in part] if causal else part
            first = () if causal else ([query] * len(part),)
            batch = tokenizer(*first, prompts, padding=True, truncation=True, return_tensors="pt").to(device)
            model(**batch, **({"logits_to_keep": 1} if causal else {})).logits.float().cpu()

    return score


def ours(path: Path, device: str, causal: bool) -> Callable[[Call], object]:
    """Load a `LocalScorer` in bfloat16."""
    scorer = LocalScorer(path, device=device, dtype="bfloat16", **(QWEN if causal else {}))
    return lambda call: scorer.score(call.queries[0], call.documents[0])


def fast(device: str, texts: Texts, shapes: Sequence[tuple[str, Path, bool]], depth: int, rounds: int) -> Table:
    """Time calls, contestants in turns."""
    numbers = torch.randn(2, 8192 if device != "cpu" else 1024, 4096, dtype=torch.bfloat16, device=device)
    rate = 2 * numbers.shape[1] ** 2 * 4096 / best(lambda: (numbers[0] @ numbers[1].T).sum().item())
    title = f"Fast: one query x {depth} passages, bfloat16; best rate {rate / 1e12:.1f} TFLOP/s"
    table = Table("shape", "contestant", "pairs/s", "[min-max]", "of the best rate", "most memory, GB", title=title)
    documents = [f"{number} {text}" for number, text in enumerate(list(texts.documents.values()) * 4)][:depth]
    call = Call(texts.questions[:1], [documents])
    for name, path, causal in shapes:
        loads: dict[str, Callable[[], Callable[[Call], object]]] = {
            "rag_rerank": lambda path=path, causal=causal: ours(path, device, causal),
            "transformers": lambda path=path, causal=causal: plain(path, device, causal),
        }
        if not causal:
            for size in (32, 256):
                loads[f"sentence-transformers, {size}"] = lambda path=path, size=size: sentence_transformers(
                    path, device, size
                )
        work, times, memory = Counter(path).operations(call)[0], dict[str, list[float]](), dict[str, float]()
        asked = {}
        for contestant, load in loads.items():
            try:
                asked[contestant] = load()
                asked[contestant](call)
            except Exception as error:  # noqa: BLE001 - a line of the table
                asked.pop(contestant, None)
                table.add_row(name, contestant, str(error)[:60], "", "", "")
        for _ in range(rounds):
            for contestant, ask in asked.items():
                if device != "cpu":
                    torch.cuda.reset_peak_memory_stats(device)
                began = time.perf_counter()
                ask(call)
                times.setdefault(contestant, []).append(time.perf_counter() - began)
                memory[contestant] = 0.0 if device == "cpu" else torch.cuda.max_memory_allocated(device) / 1e9
        for contestant, seconds in times.items():
            rates = sorted(depth / each for each in seconds)
            share = f"{work / sorted(seconds)[len(seconds) // 2] / rate:.0%}"
            spread = f"[{rates[0]:,.0f}-{rates[-1]:,.0f}]".replace("[", r"\[")
            table.add_row(
                name, contestant, f"{rates[len(rates) // 2]:,.0f}", spread, share, f"{memory[contestant]:.1f}"
            )
        del asked
        gc.collect()
    return table


def steady(device: str, texts: Texts) -> Table:
    """Look for what waits, and for what uses a device that was not asked for."""
    table = Table("what", "seen", title="Steady")
    documents = list(texts.documents.values())[:200]
    if device == "cpu":
        table.add_row("waits for the device, other devices", "only on cuda")
        return table
    with LocalScorer(folder("released"), device=device, dtype="bfloat16") as scorer:
        scorer.score(texts.questions[0], documents)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            scorer.score(texts.questions[0], documents)
        torch.cuda.set_sync_debug_mode("default")
    places = {f"{Path(each.filename).name}:{each.lineno}" for each in seen}
    table.add_row("waits for the device in a call of 200", f"{len(seen)}, at {', '.join(sorted(places))}")
    if torch.cuda.device_count() > 1:
        before = torch.cuda.memory_reserved(0)
        with LocalScorer(folder("released"), device="cuda:1", dtype="bfloat16") as scorer:
            scorer.score(texts.questions[0], documents)
        table.add_row("memory on cuda:0 for cuda:1", f"{torch.cuda.memory_reserved(0) - before:,} bytes")
    try:
        with LocalScorer(folder("released"), dtype="bfloat16", model_kwargs={"device_map": "auto"}) as scorer:
            scorer.score(texts.questions[0], documents[:2])
        table.add_row('model_kwargs={"device_map": "auto"}', "works")
    except Exception as error:  # noqa: BLE001 - a line of the table
        table.add_row('model_kwargs={"device_map": "auto"}', str(error)[:100])
    return table


def tested(device: str) -> Table:
    """Run the local tests, whose models take the first device there is."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/local", "--without-server", "-m", "not slow"]
    command += ["tests/local/transformer/test_attention.py", "--collect-only"] if device == "cpu" else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)  # noqa: S603
    table = Table("tests/local", title="Tested")
    for line in [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))][:20]:
        table.add_row(line[:160])
    table.add_row((done.stdout.strip().splitlines() or ["no output"])[-1])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu makes it a dry run")
    device = parser.parse_args().device
    dry = device == "cpu"
    console, texts = Console(width=150), Texts("passages")
    shapes = [("MiniLM-L12, released", folder("released"), False)]
    if dry:
        shapes.append(("Qwen3, 4 layers", folder("qwen3-0.6b"), True))
    else:
        large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        shapes.append(("XLM-R large", whole("xlm-roberta-base", **large), False))
        shapes.append(("Qwen3-0.6B", whole("qwen3-0.6b", num_hidden_layers=28), True))
    console.print(right(device, texts))
    console.print(fast(device, texts, shapes, 8 if dry else DEPTH, 1 if dry else ROUNDS))
    console.print(steady(device, texts))
    console.print(tested(device))


if __name__ == "__main__":
    main()
