"""Every architecture of transformers that has a head for classification, tiny: how LocalScorer runs it.

.venv/bin/python -m tests.local.architectures     # writes docs/pages/architectures.md
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from rag_rerank import ConfigError, LocalScorer, RerankError
from rag_rerank.local.transformer.proof import Unproven
from tests.models import word_piece_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "architectures.md"
KINDS: dict[str, str] = dict(sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.items()))
"""From a model type to the name of its class."""

TOLERANCE = 1e-4
QUERY = "which city is it"
DOCUMENTS = ("a small one by the river", "a city of one million people by the sea " * 16)
_WINDOW = 400  # tokens

# What sizes are called. Of these, each config gets those that it has.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_layers", "num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "hidden_dim", "dff"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "ffn_hidden_size"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), _WINDOW + 8),
}
# What else some need to be that small.
_OWN: dict[str, dict[str, Any]] = {
    "axk1": {"n_group": 1, "topk_group": 1},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "falcon": {"num_kv_heads": 4},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lilt": {"hidden_size": 96},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 64},
    "mistral4": {"num_key_value_heads": 4},
    "perceiver": {"d_latents": 64, "num_latents": 8, "num_self_attends_per_block": 1},
    "qwen3_5": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "reformer": {"axial_pos_shape": [20, 20], "axial_pos_embds_dim": [32, 32], "attn_layers": ["local", "lsh"]},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}


@dataclass(frozen=True, slots=True)
class Row:
    """What was seen of an architecture.

    Attributes:
        kind: Its model type.
        outcome: The path that `LocalScorer.proof` tells, ``"refused"``, ``"not built"`` or ``"wrong"``.
        reason: Why it is not run in the fastest way; the same on each machine.
        detail: What else there is to say.
    """

    kind: str
    outcome: str
    reason: str = ""
    detail: str = ""


def examine(kind: str, folder: Path) -> Row:
    """Make a tiny model of a type in a folder, and compare its scores with those of plain transformers."""
    try:
        _save(kind, folder)
        expected = _alone(folder)
    except Exception as error:  # noqa: BLE001 - whatever keeps transformers from making or running it
        return Row(kind, "not built", type(error).__name__, str(error))
    with LocalScorer(folder, dtype="float32", use_activation=False, template=None, device="cpu") as scorer:
        try:
            proof = scorer.proof()
            calls = ([DOCUMENTS[0]], DOCUMENTS, DOCUMENTS)  # again: some models remember what they ran
            scores = [score for documents in calls for score in scorer.score(QUERY, documents)]
        except Unproven as error:
            return Row(kind, "refused", "it gives something else in batches, even of equal length", str(error))
        except ConfigError as error:
            return Row(kind, "refused", str(error).replace(repr(str(folder)), "it").strip())
        except RerankError as error:
            return Row(kind, "wrong", "no scores", str(error))
    logits = [expected[0], *expected, *expected]
    off = max(abs(score - logit) / max(1, abs(logit)) for score, logit in zip(scores, logits, strict=True))
    if not off <= TOLERANCE:
        return Row(kind, "wrong", proof.path, f"off by {off:.2g}: {scores} for {logits}; {proof.differences}")
    why = "it sees the padding" if proof.path == "equal lengths" else ""
    return Row(kind, proof.path, why, str(proof.differences))


def _save(kind: str, folder: Path) -> None:
    tokenizer = word_piece_tokenizer(token_types=False)
    tokenizer.model_max_length = _WINDOW
    special = {f"{name}_token_id": tokenizer.cls_token_id for name in ("bos", "cls", "decoder_start")}
    special |= {f"{name}_token_id": tokenizer.sep_token_id for name in ("eos", "sep")}
    special |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer) + 8}
    own = _OWN.get(kind, {})
    config = CONFIG_MAPPING[kind](**{**_tiny(CONFIG_MAPPING[kind], {**_SIZES, **special, **own}), **own}, num_labels=1)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForSequenceClassification.from_config(config).parameters())
    if size > 4_000_000:
        raise ValueError(f"{size:,} weights are not tiny")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    _enlarge(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tiny(kind: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Choose the options of a config, and of those within it."""
    default = kind()
    options = {name: size for name, size in sizes.items() if hasattr(default, name) and _settable(default, name)}
    for name in kind.sub_configs:
        if (part := getattr(default, name, None)) is not None:
            options[name] = {"model_type": part.model_type, **_tiny(type(part), sizes)}
    return options


def _settable(config: Any, name: str) -> bool:
    """Tell an option from what a config works out by itself, or doesn't let be changed."""
    try:
        setattr(config, name, getattr(config, name))
    except (AttributeError, NotImplementedError):
        return False
    return True


def _enlarge(model: PreTrainedModel) -> None:
    """Make matrices wide enough for each token to matter: as they are drawn, scores hardly differ."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.5 if "emb" in name or "wte" in name else 1.5 * weight.shape[1] ** -0.5)


@torch.inference_mode()
def _alone(folder: Path) -> list[float]:
    """Score each pair by plain transformers; loaded anew each time, for some models remember what they ran."""
    tokenizer, logits = AutoTokenizer.from_pretrained(folder), []
    options: Any = {"truncation": "longest_first", "max_length": _WINDOW, "return_tensors": "pt"}
    for document in DOCUMENTS:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        logits.append(model(**tokenizer(QUERY, document, **options)).logits.item())
    if abs(logits[0] - logits[1]) < 5 * TOLERANCE:
        raise ValueError(f"documents make no difference: {logits}")
    return logits


def rows(kinds: Iterable[str] = KINDS) -> Iterator[Row]:
    """Examine all of them."""
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            yield examine(kind, Path(folder))


def page(seen: Sequence[Row]) -> str:
    """Write what was seen as the page."""
    counts = Counter(row.outcome for row in seen)
    numbers = ", ".join(f"{counts[outcome]} {outcome}" for outcome in _OUTCOMES if counts[outcome])
    lines = [f"| `{row.kind}` | {KINDS[row.kind]} | {row.outcome} | {row.reason} |" for row in seen]
    return _PAGE.format(version=transformers.__version__, numbers=numbers, rows="\n".join(lines))


_OUTCOMES = ("unpadded", "padded", "equal lengths", "refused", "not built", "wrong")
_PAGE = """# Architectures

<!-- Written by: python -m tests.local.architectures -->

`LocalScorer` runs any cross-encoder of transformers. How it runs yours is found out on the model itself when it loads:
what it gives for a short and a long text in a batch must be what plain transformers give for each alone.
`LocalScorer.proof()` tells what was seen. The ways, fastest first:

- **unpadded**: texts lie end to end in one row, and each attends to itself only.
- **padded**: texts lie side by side, filled up to the longest.
- **equal lengths**: side by side, but only those of the same length, for the model sees what it is filled up with.
- **refused**: a `ConfigError` when the model loads. In all three ways some text scores otherwise than alone.

This is what a test saw with transformers {version}: a tiny random model of every architecture that has a class for
sequence classification, scored in float32 alone and beside a document 20 times as long, each score compared with plain
transformers, to 1e-4. {numbers}. Not built are those that read more than text, and those that transformers itself can't
make, save or run in that size.

| Architecture | Class | Way | Why |
|---|---|---|---|
{rows}
"""


def main() -> None:
    """Write the page."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    seen = []
    for row in rows(sys.argv[1:] or KINDS):
        sys.stdout.write(f"{row.kind}: {row.outcome} {row.reason} {row.detail}\n")
        sys.stdout.flush()
        seen.append(row)
    if len(seen) == len(KINDS):
        PAGE.write_text(page(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
