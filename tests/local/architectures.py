"""Every architecture of transformers that has a head for classification, tiny: how LocalScorer runs it.

    .venv/bin/python -m tests.local.architectures     # writes docs/pages/architectures.md
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from rag_rerank import ConfigError, LocalScorer
from tests.models import word_piece_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "architectures.md"
KINDS: dict[str, str] = dict(sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.items()))
"""From a model type to the name of its class."""

TOLERANCE = 1e-4
QUERY = "which city is it"
DOCUMENTS = ("a small one by the river", "a city of one million people by the sea " * 13)
_WINDOW = 256  # tokens

# What sizes are called. Of these, each config gets those that it has.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_layers", "num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "hidden_dim", "dff"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "ffn_hidden_size"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), _WINDOW + 8),
}
# What else some need to be that small.
_OWN: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True, slots=True)
class Row:
    """What was seen of an architecture.

    Attributes:
        kind: Its model type.
        outcome: The path that `LocalScorer.proof` tells, ``"refused"``, ``"not built"`` or ``"wrong"``.
        reason: Why it was refused, or not built; or by how much it is wrong.
    """

    kind: str
    outcome: str
    reason: str = ""


def examine(kind: str, folder: Path) -> Row:
    """Make a tiny model of a type in a folder, and compare its scores with those of plain transformers."""
    try:
        _save(kind, folder)
        expected = [_alone(folder, document) for document in DOCUMENTS]
    except Exception as error:  # noqa: BLE001 - whatever keeps transformers from making or running it
        return Row(kind, "not built", f"{type(error).__name__}: {error}")
    scorer = LocalScorer(folder, dtype="float32", use_activation=False, template=None, device="cpu")
    with scorer:
        try:
            path = scorer.proof().path
            scores = [*scorer.score(QUERY, DOCUMENTS[0]), *scorer.score(QUERY, DOCUMENTS), *scorer.score(QUERY, DOCUMENTS)]
        except ConfigError as error:
            return Row(kind, "refused", str(error).replace(repr(str(folder)), "it"))
    off = max(abs(score - logit) / max(1, abs(logit)) for score, logit in zip(scores, expected[:1] + expected * 2))
    if not off <= TOLERANCE or abs(expected[0] - expected[1]) < 100 * TOLERANCE:
        return Row(kind, "wrong", f"off by {off:.2g}, {expected}, {scores}")
    return Row(kind, path)


def _save(kind: str, folder: Path) -> None:
    tokenizer = word_piece_tokenizer(token_types=False)
    tokenizer.model_max_length = _WINDOW
    special = {f"{name}_token_id": tokenizer.cls_token_id for name in ("bos", "cls", "decoder_start")}
    special |= {f"{name}_token_id": tokenizer.sep_token_id for name in ("eos", "sep")}
    special |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    default = CONFIG_MAPPING[kind]()
    sizes = {name: size for name, size in {**_SIZES, **special}.items() if hasattr(default, name)}
    config = CONFIG_MAPPING[kind](**{**sizes, **_OWN.get(kind, {}), "num_labels": 1})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    _enlarge(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _enlarge(model: PreTrainedModel) -> None:
    """Make matrices wide enough for each token to matter: as they are drawn, scores hardly differ."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.5 if "emb" in name or "wte" in name else 1.5 * weight.shape[1] ** -0.5)


@torch.inference_mode()
def _alone(folder: Path, document: str) -> float:
    """Score a pair by plain transformers; loaded anew, for some models remember what they ran."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return model.eval()(**tokenizer(QUERY, document, return_tensors="pt")).logits.item()


def rows() -> Iterator[Row]:
    """Examine all of them."""
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            yield examine(kind, Path(folder))


def page(seen: list[Row]) -> str:
    """Write what was seen as the page."""
    counts = Counter(row.outcome for row in seen)
    return "\n".join(f"{row}" for row in seen) + f"\n{counts}"


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    import sys, time
    global KINDS
    if len(sys.argv) > 1:
        KINDS = {k: KINDS[k] for k in sys.argv[1:]}
    seen = []
    for row in rows():
        print(round(time.process_time(), 1), row.kind, "|", row.outcome, "|", row.reason[:400], flush=True)
        seen.append(row)
    print(Counter(row.outcome for row in seen))


if __name__ == "__main__":
    main()
