"""From settings to a model that is ready to score: finds out what a checkpoint is, and puts the parts together."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rag_rerank.errors import ConfigError
from rag_rerank.families import Family, find_family
from rag_rerank.local.checkpoint.checkpoint import Checkpoint, max_length, module_kind
from rag_rerank.local.hardware import choose_batching, choose_device
from rag_rerank.local.models.bi_encoder import BiEncoder, pooling_of
from rag_rerank.local.models.cross_encoder import (
    Activation,
    Head,
    PairModel,
    Whole,
    classification_head,
    own_activation,
)
from rag_rerank.local.models.decoder import last_token_head, score_row, token_ids, token_row
from rag_rerank.local.models.encoding import Truncation
from rag_rerank.local.models.late_interaction import LateInteraction, is_late_interaction, read_projection
from rag_rerank.local.models.model import Model, ScoreType
from rag_rerank.local.models.prompts import Prompts
from rag_rerank.local.models.vision.processor import ImageProcessor
from rag_rerank.local.models.vision.prompts import ImagePrompts
from rag_rerank.local.models.vision.transformer import MODEL_TYPES, VisionTransformer
from rag_rerank.local.settings import Settings
from rag_rerank.local.transformer.transformer import Transformer, known, make_transformer
from rag_rerank.template import Template

# Arguments of from_pretrained that say where files come from and where weights go, not what they are.
_NO_FACTS = (
    *("cache_dir", "device_map", "force_download", "local_files_only", "low_cpu_mem_usage", "max_memory"),
    *("offload_buffers", "offload_folder", "offload_state_dict", "proxies", "resume_download"),
)


def load(settings: Settings) -> Model:
    """Load a model for scoring.

    Raises:
        ConfigError: It is not there, not a reranker, not safetensors, lacks weights, has no known template, or does not
            fit the settings.
    """
    checkpoint = Checkpoint(settings)
    device = choose_device(settings.device)
    family = find_family(checkpoint.name, checkpoint.architectures)
    if family is not None and not family.local:
        flags = family.vllm_flags.replace("{template}", f"{family.template}")
        raise ConfigError(f"{checkpoint.name!r} runs on vLLM only: vllm serve {checkpoint.name} {flags}")
    loading = _Loading(checkpoint, settings, family, device)
    kind = _kind(checkpoint, settings.score_type)
    score_type: ScoreType = getattr(loading, kind.replace("-", "_"))()
    template = loading.template
    asked = f"{checkpoint.name!r}, without a template," if template is None else f"the template {template.name!r}"
    takes_instruction = template is not None and template.takes("instruction")
    return Model(
        score_type=score_type,
        tokenizer=checkpoint.tokenizer,
        facts={"score type": kind, **loading.facts, **_facts(settings), **checkpoint.fingerprint()},
        text_only=None if kind == "vision" else f"holds an image or a video, but {checkpoint.name} reads text only",
        no_instruction=None if takes_instruction else f"{asked} has no place for an instruction",
        max_tokens_per_query=settings.max_tokens_per_query,
        max_tokens_per_doc=settings.max_tokens_per_doc,
        passages=settings.long_documents == "max-passage",
        document_prompt=settings.document_prompt or "",
    )


def _facts(settings: Settings) -> dict[str, str]:
    """Tell what of the settings can change a score as it is written there.

    Versions of torch and transformers are no facts: they change the last digits, as another processor does, and a run
    must survive an update. What changes more would be a fault, which the tests against transformers show.
    """
    variables = settings.variables
    facts: dict[str, Any] = {"instruction": variables.pop("instruction"), "chat_template_kwargs": variables}
    for name in ("query_prompt", "document_prompt", "max_tokens_per_query", "max_tokens_per_doc", "long_documents"):
        facts[name] = getattr(settings, name)
    for name in ("model_kwargs", "tokenizer_kwargs"):
        facts[name] = {key: value for key, value in getattr(settings, name).items() if key not in _NO_FACTS}
    facts |= {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    return {name: json.dumps(value, sort_keys=True, default=repr) for name, value in facts.items()}


def _kind(checkpoint: Checkpoint, asked: str) -> str:
    """Tell what the checkpoint is, checked against what the caller says."""
    architecture = (*checkpoint.architectures, "(none)")[0]
    modules = [module_kind(module) for module in checkpoint.modules or []]
    if asked == "late-interaction" or (asked == "auto" and is_late_interaction(architecture, modules)):
        return "late-interaction"
    classifier = architecture.endswith("ForSequenceClassification")
    reads_images = checkpoint.config.model_type in MODEL_TYPES
    if asked == "bi-encoder" or (asked == "auto" and not classifier and modules):
        return "bi-encoder"
    if architecture.endswith("ForCausalLM"):
        return "causal"
    if architecture.endswith("ForConditionalGeneration") and reads_images:
        return "vision"
    if not classifier:
        raise ConfigError(
            f"{checkpoint.name!r} is a {architecture}: neither a *ForSequenceClassification nor a *ForCausalLM nor a "
            "sentence-transformers or ColBERT model. Pass a reranker such as cross-encoder/ms-marco-MiniLM-L6-v2."
        )
    if checkpoint.config.num_labels != 1:
        raise ConfigError(
            f"{checkpoint.name!r} has {checkpoint.config.num_labels} labels; a reranker has one. "
            "It classifies, it does not score relevance."
        )
    return "vision" if reads_images else "classifier"


@dataclass(slots=True)
class _Loading:
    """What is known before the weights are read; one method for each kind of model.

    Attributes:
        facts: What was found out on the way that can change a score.
        template: The template to prompt with, if any; set on the way.
    """

    checkpoint: Checkpoint
    settings: Settings
    family: Family | None
    device: torch.device
    facts: dict[str, str] = field(default_factory=dict)
    template: Template | None = None

    def classifier(self) -> ScoreType:
        """Load a model with a one-label head: that of an encoder is called "classifier", that of a decoder "score"."""
        model = self._model(AutoModelForSequenceClassification)
        score = getattr(model, "score", None)
        self._choose_template(needed=isinstance(score, torch.nn.Linear))
        # A checkpoint's own code may read its score from elsewhere (nemotron: the mean): that runs as it is.
        if isinstance(score, torch.nn.Linear) and type(model).__module__.startswith("transformers."):
            return self._pair_model(model, last_token_head(score.weight[0].detach().float()))
        if known(_body(model)):
            return self._pair_model(model, classification_head(model))
        whole = Whole(model, self.checkpoint.tokenizer.pad_token_id or 0, choose_batching(self.device))
        return PairModel(self._prompts(model), self._activation(), whole, lambda states: states.tokens)

    def causal(self) -> ScoreType:
        """Load a model that answers with a word."""
        ids = self._answers()
        model = self._model(AutoModelForCausalLM)
        return self._pair_model(model, last_token_head(token_row(model, ids)))

    def vision(self) -> ScoreType:
        """Load a model that reads images, and answers with a word or has a head that transformers has no class for."""
        processor = ImageProcessor.of(self.checkpoint)
        if self.checkpoint.architectures[0].endswith("ForSequenceClassification"):
            self._choose_template(needed=True)
            row = score_row(self.checkpoint).to(self.device)
            model = self._model(AutoModel)
        else:
            ids = self._answers()
            model = self._model(AutoModelForImageTextToText)
            row = token_row(model, ids)
        pad_id = self.checkpoint.tokenizer.pad_token_id
        transformer = VisionTransformer.of(_body(model), processor, pad_id, choose_batching(self.device))
        prompts = ImagePrompts(self._prompts(model), transformer.tower)
        return PairModel(prompts, self._activation(), transformer, last_token_head(row))

    def _model(self, auto: Any) -> PreTrainedModel:
        model = self.checkpoint.model(auto, self.device)
        self.facts |= {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
        return model

    def _pair_model(self, model: PreTrainedModel, head: Head) -> PairModel:
        return PairModel(self._prompts(model), self._activation(), self._transformer(_body(model)), head)

    def _answers(self) -> list[int]:
        """Find the tokens of the words, and the template: what is wrong with them is told before gigabytes are read."""
        # vLLM's name for the words, in --hf-overrides; a checkpoint may have it in its own config.
        tokens = self.settings.classifier_tokens or getattr(self.checkpoint.config, "classifier_from_token", None)
        tokens = tokens or (self.family.tokens if self.family is not None else ())
        if not tokens:
            raise ConfigError(
                f"{self.checkpoint.name!r} is a {self.checkpoint.architectures[0]} that is no known reranker. If it is "
                'one, pass template= with its prompt and classifier_tokens= with its answer, such as ("no", "yes").'
            )
        self.facts["classifier tokens"] = json.dumps(list(tokens))
        ids = token_ids(self.checkpoint.tokenizer, tokens, self.checkpoint.name)
        self._choose_template(needed=True)
        return ids

    def bi_encoder(self) -> ScoreType:
        """Load a sentence-transformers folder of transformer, pooling and perhaps normalisation."""
        checkpoint = self.checkpoint
        if checkpoint.modules is None:
            raise ConfigError(
                f"{checkpoint.name!r} has no modules.json, so how its token states become an embedding is unknown. "
                "Pass a sentence-transformers model, or a cross-encoder."
            )
        paths = {module_kind(module): str(module["path"]) for module in checkpoint.modules}
        if paths.keys() - {"Transformer", "Pooling", "Normalize"} or "Pooling" not in paths:
            raise ConfigError(
                f"{checkpoint.name!r} is made of {', '.join(paths)}; as a bi-encoder only Transformer, Pooling and "
                "Normalize are supported"
            )
        return BiEncoder(
            *self._encoder(),
            pooling_of(checkpoint.json(f"{paths['Pooling']}/config.json") or {}),
            bool(checkpoint.sentence_config.get("do_lower_case", False)),
        )

    def late_interaction(self) -> ScoreType:
        """Load a ColBERT: an encoder and a projection, beside it or in ``Dense`` folders of its own."""
        checkpoint = self.checkpoint
        paths = [str(module["path"]) for module in checkpoint.modules or [] if module_kind(module) == "Dense"]
        dense = {path: checkpoint.json(f"{path}/config.json") or {} for path in paths}
        projection = read_projection(checkpoint.file, dense).to(self.device)
        normalize = self.settings.use_activation is not False
        self.facts["normalize"] = str(normalize)
        return LateInteraction(*self._encoder(), projection, normalize)

    def _encoder(self) -> tuple[Transformer, PreTrainedTokenizerBase, int]:
        """Load a model without a head, its tokenizer, and its longest input."""
        model = self._model(AutoModel)
        return self._transformer(model), self.checkpoint.tokenizer, self._max_length(model)

    def _transformer(self, model: PreTrainedModel) -> Transformer:
        return make_transformer(model, self.checkpoint.tokenizer.pad_token_id, choose_batching(self.device))

    def _max_length(self, model: PreTrainedModel) -> int:
        limit = max_length(self.checkpoint, model, self.settings.max_length)
        if self.settings.max_length is None and self.family is not None and self.family.max_length is not None:
            limit = min(limit, self.family.max_length)
        self.facts["max_length"] = str(limit)
        return limit

    def _prompts(self, model: PreTrainedModel) -> Prompts:
        truncation: Truncation = "longest_first" if self.settings.max_tokens_per_doc is None else "only_second"
        limit, variables = self._max_length(model), self.settings.variables
        return Prompts(self.checkpoint.tokenizer, limit, self.template, variables, truncation)

    def _choose_template(self, *, needed: bool) -> None:
        """Take the caller's template, the family's, or one for scoring that the checkpoint brings."""
        self.template = self._find_template(needed=needed)
        source = None if self.template is None else self.template.source.encode()
        self.facts["template"] = "none" if source is None else hashlib.sha256(source).hexdigest()[:16]

    def _find_template(self, *, needed: bool) -> Template | None:
        if isinstance(self.settings.template, Template) or self.settings.template is None:
            return self.settings.template
        if self.family is not None and self.family.template is not None:
            return Template.load(self.family.template)
        saved = self.checkpoint.tokenizer.chat_template
        # Most checkpoints inherit a chat template from the model that they were made of; one for scoring has its roles.
        if isinstance(saved, str) and any(
            f"{mark}query{mark}" in saved and f"{mark}document{mark}" in saved for mark in "\"'"
        ):
            return Template("chat_template", saved)
        if needed:
            architecture, shipped = self.checkpoint.architectures[0], ", ".join(Template.shipped())
            raise ConfigError(
                f"the score template of {self.checkpoint.name!r} is not known; a {architecture} scores near random "
                f"without it. Pass template=: {shipped}, a file, or the text; or None if it was trained on plain pairs."
            )
        return None

    def _activation(self) -> Activation:
        own = torch.nn.Identity() if self.settings.use_activation is False else own_activation(self.checkpoint.config)
        self.facts["activation"] = getattr(own, "__name__", type(own).__name__).lower()
        if self.family is None or (self.family.logit_scale, self.family.logit_bias) == (1.0, 0.0):
            return own
        scale, bias = self.family.logit_scale, self.family.logit_bias
        self.facts["activation"] += f" of logits * {scale} + {bias}"
        return lambda logits: own(logits * scale + bias)  # without the activation, too: so does vLLM


def _body(model: PreTrainedModel) -> PreTrainedModel:
    return cast("PreTrainedModel", model.base_model)
