"""From settings to a model that is ready to score: finds out what a checkpoint is, and puts the parts together."""

import json
import re
import threading
from typing import Any

from rag_rerank.errors import ConfigError
from rag_rerank.families import find_family
from rag_rerank.forking import held_over_forks
from rag_rerank.local.checkpoint.checkpoint import Checkpoint
from rag_rerank.local.checkpoint.files import Files
from rag_rerank.local.embedders import EmbedderLoading
from rag_rerank.local.hardware import choose_device
from rag_rerank.local.models.model import Model, ScoreType, special_tokens
from rag_rerank.local.models.vision.transformer import MODEL_TYPES
from rag_rerank.local.pairs import PairLoading
from rag_rerank.local.settings import Settings

# Arguments of from_pretrained that say where files come from and where weights go, not what they are.
_NO_FACTS = (
    *("cache_dir", "device_map", "force_download", "local_files_only", "low_cpu_mem_usage", "max_memory"),
    *("offload_buffers", "offload_folder", "offload_state_dict", "proxies", "resume_download"),
)

_KINDS = {
    "ForCausalLM": "causal",
    "T5ForConditionalGeneration": "sequence-to-sequence",
    "JinaForRanking": "listwise",
    "JinaVLForRanking": "vision",
}

# Names of labels that say "not relevant".
_NEGATIVE = re.compile(r"(?i)(no|not|non|false|negative|0)(?![a-z])|(ir|un|dis|non|not)(relev|relat|simil|match)")

# Held while a model is loaded: transformers changes torch's default dtype for the whole process meanwhile, and of two
# at a time one would put back the other's. A fork waits, so that a child has neither lock nor dtype left half-way.
one_at_a_time = held_over_forks(threading.RLock())


def load(settings: Settings) -> Model:
    """Load a model for scoring, with `one_at_a_time` held.

    ConfigError if it is not there, not a reranker, not safetensors, lacks weights, has no known template, or does not
    fit the settings.
    """
    checkpoint = Checkpoint(
        Files(settings.model, settings.revision, settings.cache_dir, settings.local_files_only),
        None if settings.score_type == "auto" else settings.score_type,
        trust_remote_code=settings.trust_remote_code,
        tokenizer_kwargs=settings.tokenizer_kwargs,
    )
    device = choose_device(settings.device)
    family = find_family(checkpoint.name, checkpoint.architectures)
    if family is not None and not family.local:
        raise ConfigError(f"{checkpoint.name!r} runs on vLLM only: {'; '.join(family.serve(checkpoint.name))}")
    kind = _kind(checkpoint)
    loads = PairLoading if checkpoint.declaration.kind == "cross-encoder" else EmbedderLoading
    loading = loads(checkpoint, settings, family, device)
    score_type: ScoreType = getattr(loading, kind.replace("-", "_"))()
    template = loading.template
    prompted = template is not None or kind == "listwise"
    asked = f"{checkpoint.name!r}, without a template," if template is None else f"the template {template.name!r}"
    takes = kind == "listwise" or (template is not None and template.takes("instruction"))
    no_instruction = None if takes else f"{asked} has no place for an instruction"
    if no_instruction is not None and settings.instruction is not None:
        raise ConfigError(no_instruction)
    [space] = score_type.document_space([""])
    if space < 1:
        limit = int(loading.facts["max_length"])
        taken = f"{limit - space} go to special tokens, prompt and template"
        raise ConfigError(f"max_length is {limit} for {checkpoint.name!r}, of which {taken}: no document would be read")
    return Model(
        score_type=score_type,
        tokenizer=checkpoint.tokenizer,
        facts={"score type": kind, **loading.facts, **_facts(settings), **checkpoint.fingerprint()},
        text_only=None if kind == "vision" else f"holds an image or a video, but {checkpoint.name} reads text only",
        no_instruction=no_instruction,
        max_tokens_per_query=settings.max_tokens_per_query,
        max_tokens_per_doc=settings.max_tokens_per_doc,
        special=special_tokens(checkpoint.tokenizer) if prompted or loading.special_prompts else None,
        listwise=kind == "listwise",
        passages=settings.long_documents == "max-passage",
        prompts={"queries": settings.query_prompt or "", "documents": settings.document_prompt or ""},
        declaration=checkpoint.declaration,
        proof=loading.proof,
    )


def _facts(settings: Settings) -> dict[str, str]:
    """Tell what of the settings can change a score as it is written there.

    Versions of torch and transformers are no facts: they change the last digits, and a run must survive an update.
    """
    variables = settings.variables
    facts: dict[str, Any] = {"instruction": variables.pop("instruction"), "chat_template_kwargs": variables}
    names = "query_prompt", "document_prompt", "max_tokens_per_query", "max_tokens_per_doc", "long_documents"
    facts |= {name: getattr(settings, name) for name in (*names, "revision", "trust_remote_code")}
    for name in ("model_kwargs", "tokenizer_kwargs"):
        facts[name] = {key: value for key, value in getattr(settings, name).items() if key not in _NO_FACTS}
    return {name: json.dumps(value, sort_keys=True, default=repr) for name, value in facts.items()}


def _kind(checkpoint: Checkpoint) -> str:
    """Tell how the checkpoint is run."""
    declared, config = checkpoint.declaration, checkpoint.config
    if declared.kind != "cross-encoder":
        return declared.kind
    architecture = (*checkpoint.architectures, "(none)")[0]
    pools, reads_images = declared.document.pooling is not None, config.model_type in MODEL_TYPES
    if not pools and not architecture.endswith("ForSequenceClassification"):
        for ending, kind in _KINDS.items():
            if architecture.endswith(ending):
                return kind
        if architecture.endswith("ForConditionalGeneration") and reads_images:
            return "vision"
        raise ConfigError(
            f"{checkpoint.name!r} is a {architecture} (architectures in config.json): neither a "
            "*ForSequenceClassification nor a *ForCausalLM nor a sentence-transformers or ColBERT model. Pass a "
            "reranker such as cross-encoder/ms-marco-MiniLM-L6-v2."
        )
    labels, field = (declared.labels, "out_features") if pools else (config.num_labels, "id2label")
    if (labels or 1) > 2:
        raise ConfigError(
            f"{checkpoint.name!r} has {labels} labels (config.json: {field}); a reranker has one, or two of which the "
            "second says relevant. It classifies, it does not score relevance: pass a reranker."
        )
    if not pools and labels == 2 and config.problem_type not in (None, "single_label_classification"):
        raise ConfigError(
            f"{checkpoint.name!r} has two labels of which both may be right (config.json: problem_type is "
            f"{config.problem_type!r}): it classifies, it does not score relevance. Pass a reranker."
        )
    names = [name for _, name in sorted((config.id2label or {}).items())]
    if not pools and len(names) == 2 and _NEGATIVE.match(f"{names[1]}") and not _NEGATIVE.match(f"{names[0]}"):
        raise ConfigError(
            f"{checkpoint.name!r}: config.json: id2label calls the second of two labels {names[1]!r}, but the second "
            "is taken for relevance, as rerankers are trained. Swap the rows of the head and the labels."
        )
    return "modular" if pools else "vision" if reads_images else "classifier"
