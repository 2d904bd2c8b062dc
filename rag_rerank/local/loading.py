"""From settings to a model that is ready to score: finds out what a checkpoint is, and puts the parts together."""

from dataclasses import dataclass
from typing import cast

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
from rag_rerank.local.hardware import choose_device, pace
from rag_rerank.local.models.bi_encoder import BiEncoder, pooling_of
from rag_rerank.local.models.cross_encoder import Activation, CrossEncoder, Head, WholeCrossEncoder, own_activation
from rag_rerank.local.models.decoder import Decoder, score_row, token_ids, token_row
from rag_rerank.local.models.late_interaction import LateInteraction, is_late_interaction, read_projection
from rag_rerank.local.models.model import Model
from rag_rerank.local.models.passages import MaxPassage
from rag_rerank.local.models.prompts import Limited, Prompts
from rag_rerank.local.models.vision.processor import ImageProcessor
from rag_rerank.local.models.vision.prompts import PicturePrompts
from rag_rerank.local.models.vision.transformer import MODEL_TYPES, VisionTransformer
from rag_rerank.local.settings import Settings
from rag_rerank.local.transformer.transformer import Padded, Transformer, known, over
from rag_rerank.template import Template


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
    kinds = {
        "causal": loading.causal,
        "vision": loading.vision,
        "bi-encoder": loading.bi_encoder,
        "late-interaction": loading.late_interaction,
        "classifier": loading.classifier,
    }
    model = kinds[_kind(checkpoint, settings.score_type)]()
    if settings.long_documents == "max-passage":
        model = MaxPassage(model, checkpoint.tokenizer, settings.document_prompt or "")
    if settings.max_tokens_per_query is None and settings.max_tokens_per_doc is None:
        return model
    return Limited(model, checkpoint.tokenizer, settings.max_tokens_per_query, settings.max_tokens_per_doc)


def _kind(checkpoint: Checkpoint, asked: str) -> str:
    """What the checkpoint is, checked against what the caller says."""
    architecture = (*checkpoint.architectures, "(none)")[0]
    modules = [module_kind(module) for module in checkpoint.modules or []]
    if asked == "late-interaction" or (asked == "auto" and is_late_interaction(architecture, modules)):
        return "late-interaction"
    classifier = architecture.endswith("ForSequenceClassification")
    sees = checkpoint.config.model_type in MODEL_TYPES
    if asked == "bi-encoder" or (asked == "auto" and not classifier and modules):
        return "bi-encoder"
    if architecture.endswith("ForCausalLM"):
        return "causal"
    if architecture.endswith("ForConditionalGeneration") and sees:
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
    return "vision" if sees else "classifier"


@dataclass(frozen=True, slots=True)
class _Loading:
    """What is known before the weights are read; one method for each kind of model."""

    checkpoint: Checkpoint
    settings: Settings
    family: Family | None
    device: torch.device

    def classifier(self) -> Model:
        """A model with a one-label head: that of an encoder is called "classifier", that of a decoder "score"."""
        model = self.checkpoint.model(AutoModelForSequenceClassification, self.device)
        head = getattr(model, "score", None)
        prompts = self._prompts(model, self._template(needed=isinstance(head, torch.nn.Linear)))
        # A checkpoint's own code may read its score from elsewhere (nemotron: the mean): that runs as it is.
        if isinstance(head, torch.nn.Linear) and type(model).__module__.startswith("transformers."):
            row = head.weight[0].detach().float()
            return Decoder(prompts, self._activation(), self._over(_body(model)), row)
        if known(_body(model)):
            return CrossEncoder(prompts, self._activation(), self._over(_body(model)), Head(model))
        pad_id = self.checkpoint.tokenizer.pad_token_id or 0
        return WholeCrossEncoder(prompts, self._activation(), Padded(model, pad_id, pace(self.device)))

    def causal(self) -> Model:
        """A model that answers with a word."""
        ids, template = self._answers()
        model = self.checkpoint.model(AutoModelForCausalLM, self.device)
        prompts = self._prompts(model, template)
        row = token_row(model, ids)
        return Decoder(prompts, self._activation(), self._over(_body(model)), row)

    def vision(self) -> Model:
        """A model that sees, and answers with a word; or with a head, for which transformers has no class."""
        processor = ImageProcessor.of(self.checkpoint)
        if self.checkpoint.architectures[0].endswith("ForSequenceClassification"):
            template, row = self._template(needed=True), score_row(self.checkpoint).to(self.device)
            model = self.checkpoint.model(AutoModel, self.device)
        else:
            ids, template = self._answers()
            model = self.checkpoint.model(AutoModelForImageTextToText, self.device)
            row = token_row(model, ids)
        pad_id = self.checkpoint.tokenizer.pad_token_id
        transformer = VisionTransformer.over(_body(model), processor, pad_id, pace(self.device))
        prompts = PicturePrompts(self._prompts(model, template), transformer.tower)
        return Decoder(prompts, self._activation(), transformer, row)

    def _answers(self) -> tuple[list[int], Template | None]:
        """The tokens of the words, and the template. What is wrong with them is told before gigabytes are read."""
        # vLLM's name for the words, in --hf-overrides; a checkpoint may have it in its own config.
        tokens = self.settings.classifier_tokens or getattr(self.checkpoint.config, "classifier_from_token", None)
        tokens = tokens or (self.family.tokens if self.family is not None else ())
        if not tokens:
            raise ConfigError(
                f"{self.checkpoint.name!r} is a {self.checkpoint.architectures[0]} that is no known reranker. If it is "
                'one, pass template= with its prompt and classifier_tokens= with its answer, such as ("no", "yes").'
            )
        return token_ids(self.checkpoint.tokenizer, tokens, self.checkpoint.name), self._template(needed=True)

    def bi_encoder(self) -> Model:
        """A sentence-transformers folder of transformer, pooling and perhaps normalisation."""
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

    def late_interaction(self) -> Model:
        """A ColBERT: an encoder and a projection, beside it or in ``Dense`` folders of its own."""
        checkpoint = self.checkpoint
        paths = [str(module["path"]) for module in checkpoint.modules or [] if module_kind(module) == "Dense"]
        dense = {path: checkpoint.json(f"{path}/config.json") or {} for path in paths}
        projection = read_projection(checkpoint.file, dense).to(self.device)
        return LateInteraction(
            *self._encoder(),
            projection,
            normalize=self.settings.use_activation is not False,
        )

    def _encoder(self) -> tuple[Transformer, PreTrainedTokenizerBase, int]:
        """A model without a head, its tokenizer, and its longest input."""
        model = self.checkpoint.model(AutoModel, self.device)
        limit = max_length(self.checkpoint, model, self.settings.max_length)
        return self._over(model), self.checkpoint.tokenizer, limit

    def _over(self, model: PreTrainedModel) -> Transformer:
        return over(model, self.checkpoint.tokenizer.pad_token_id, pace(self.device))

    def _prompts(self, model: PreTrainedModel, template: Template | None) -> Prompts:
        settings = self.settings
        limit = max_length(self.checkpoint, model, settings.max_length)
        if settings.max_length is None and self.family is not None and self.family.max_length is not None:
            limit = min(limit, self.family.max_length)
        return Prompts(
            self.checkpoint.tokenizer,
            limit,
            template,
            settings.variables,
            "longest_first" if settings.max_tokens_per_doc is None else "only_second",
        )

    def _template(self, *, needed: bool) -> Template | None:
        """The template to prompt with: the caller's, the family's, or one for scoring that the checkpoint brings."""
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
        if self.family is None or (self.family.logit_scale, self.family.logit_bias) == (1.0, 0.0):
            return own
        scale, bias = self.family.logit_scale, self.family.logit_bias
        return lambda logits: own(logits * scale + bias)  # without the activation, too: so does vLLM


def _body(model: PreTrainedModel) -> PreTrainedModel:
    """A model without its head."""
    return cast("PreTrainedModel", model.base_model)
