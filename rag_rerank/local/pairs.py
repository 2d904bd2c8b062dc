"""Cross-encoders: loaded as the checkpoint is made, with their prompts and the scale of their scores."""

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rag_rerank.errors import ConfigError
from rag_rerank.local.checkpoint.chat import ChatTemplate
from rag_rerank.local.checkpoint.declaration import IDENTITY, SCORE_TEMPLATE, SIGMOID, Pooling
from rag_rerank.local.models.cross_encoder import (
    Activation,
    PairModel,
    classifier_parts,
    make_head_precise,
    relevance,
    whole_parts,
)
from rag_rerank.local.models.decoder import (
    answer_head,
    causal_parts,
    keep_answers,
    stored_head,
    stored_layers,
    token_ids,
)
from rag_rerank.local.models.encoding import Truncation
from rag_rerank.local.models.layers import activation, config_activation
from rag_rerank.local.models.listwise import MARKS, Listwise
from rag_rerank.local.models.model import ScoreType
from rag_rerank.local.models.native.translation import ENDS
from rag_rerank.local.models.prompts import ChatPrompts, Prompts
from rag_rerank.local.models.sequence_to_sequence import FirstStep
from rag_rerank.local.models.vision.processor import ImageProcessor
from rag_rerank.local.models.vision.prompts import ImagePrompts
from rag_rerank.local.models.vision.transformer import VisionTransformer
from rag_rerank.local.transformer.proof import Parts
from rag_rerank.local.transformer.transformer import looks_ahead
from rag_rerank.local.weights import Loading
from rag_rerank.template import Template

logger = logging.getLogger(__name__)


class PairLoading(Loading):
    """One method for each kind of cross-encoder."""

    def classifier(self) -> ScoreType:
        """Load a model with a head: that of an encoder is called "classifier", that of a decoder "score"."""
        model = self.load(AutoModelForSequenceClassification)
        self._choose_template(needed=isinstance(getattr(model, "score", None), torch.nn.Linear))
        make_head_precise(model, self.checkpoint.stored)
        loaded = self._pair_model(model, lambda model: classifier_parts(model, self.plain(model.base_model)))
        if not isinstance(getattr(model, "score", None), torch.nn.Linear) or looks_ahead(model):
            return loaded
        # transformers reads the last token that is none of its config's padding, though a template may end with it.
        return replace(loaded, unread=model.config.get_text_config().pad_token_id)

    def causal(self) -> ScoreType:
        """Load a model that answers with a word."""
        ids = self._answers()
        model = self.load(AutoModelForCausalLM)
        keep_answers(model, ids)
        return self._pair_model(model, lambda model: causal_parts(model, self.plain(model.base_model)))

    def sequence_to_sequence(self) -> ScoreType:
        """Load an encoder with a decoder that answers with a word."""
        ids = self._answers()
        model = self.load(AutoModelForSeq2SeqLM)
        keep_answers(model, ids)
        return self._pair_model(model, lambda model: whole_parts(model, self.plain(model, run_by=FirstStep)))

    def modular(self) -> ScoreType:
        """Load a transformer with a head of modules."""
        route = self.checkpoint.declaration.document
        model = self.load(AutoModel)
        self._choose_template(needed=True)
        share = cast("Pooling", route.pooling).modes == ("lasttoken",)  # there is but one state of each shared token
        head_on = functools.cache(functools.partial(self.head, route, self.settings.query_prompt))  # read once a device

        def take_apart(model: PreTrainedModel) -> Parts:
            head = head_on(model.device)
            return self.parts(model, lambda states: relevance(head(states)), share=share)

        return self._pair_model(model, take_apart)

    def vision(self) -> ScoreType:
        """Load a model that reads images, and answers with a word or has a head that transformers has no class for."""
        processor = ImageProcessor.of(self.checkpoint)
        if not self.checkpoint.architectures[0].endswith("ForConditionalGeneration"):
            self._choose_template(needed=True)
            head = stored_head(self.checkpoint)
            model = self.load(AutoModel)
        else:
            ids = self._answers()
            model = self.load(AutoModelForImageTextToText)
            keep_answers(model, ids)
            head = answer_head(model)
        body: Any = model.base_model
        text, _ = self.run(body.language_model, lambda decoder: self.parts(decoder, head))
        transformer = VisionTransformer.of(body, processor, text)
        return PairModel(ImagePrompts(self._prompts(model), transformer.tower), self._activation(), transformer, head)

    def listwise(self) -> ScoreType:
        """Load a model that reads the documents of a query together."""
        if self.settings.long_documents == "max-passage":
            raise ConfigError('a listwise model reads documents together; long_documents="max-passage" scores parts')
        projector = stored_layers(self.checkpoint, "projector.0", "projector.2")
        tokenizer = self.checkpoint.tokenizer
        marks = cast("list[int | None]", tokenizer.convert_tokens_to_ids(list(MARKS)))
        if None in marks or tokenizer.unk_token_id in marks:
            raise ConfigError(f"the tokenizer of {self.checkpoint.name!r} has no {' and '.join(MARKS)}")
        model = self.load(AutoModel)
        transformer, _ = self.run(model, lambda body: self.parts(body, lambda states: projector(states.last().float())))
        limit = self.max_length(model, self.checkpoint.declaration.document)
        instruction = self.settings.variables["instruction"]
        return Listwise(tokenizer, limit, instruction, cast("tuple[int, int]", tuple(marks)), transformer, projector)

    def _pair_model(self, model: PreTrainedModel, take_apart: Callable[[Any], Parts]) -> PairModel:
        transformer, head = self.run(model, take_apart)
        return PairModel(self._prompts(model), self._activation(), transformer, head)

    def _answers(self) -> list[int]:
        """Find the tokens of the words, and the template: what is wrong with them is told before gigabytes are read."""
        # vLLM's name for the words, in --hf-overrides; a checkpoint may have it in its own config.
        tokens = self.settings.classifier_tokens or getattr(self.checkpoint.config, "classifier_from_token", None)
        if self.settings.classifier_tokens is None and self.checkpoint.declaration.answers:
            ids = list(self.checkpoint.declaration.answers)
            tokens = [f"{token}" for token in self.checkpoint.tokenizer.convert_ids_to_tokens(ids)]
        else:
            tokens = tokens or (self.family.tokens if self.family is not None else ())
            if not tokens:
                raise ConfigError(
                    f"{self.checkpoint.name!r} is a {self.checkpoint.architectures[0]} that is no known reranker. If "
                    "it is one, pass template= with its prompt and classifier_tokens= with its answer, such as "
                    '("no", "yes").'
                )
            ids = token_ids(self.checkpoint.tokenizer, tokens, self.checkpoint.name)
        self.facts["classifier tokens"] = json.dumps(list(tokens))
        self._choose_template(needed=True)
        return ids

    def _prompts(self, model: PreTrainedModel) -> Prompts:
        truncation: Truncation = "longest_first" if self.settings.max_tokens_per_doc is None else "only_second"
        declared, tokenizer = self.checkpoint.declaration, self.checkpoint.tokenizer
        variables = {**tokenizer.special_tokens_map, **self.settings.variables}
        limit = self.max_length(model, declared.document)
        if not isinstance(self.template, ChatTemplate):
            prompt = declared.document.prompt if self.settings.query_prompt is None else ""
            end = next((ENDS[each] for each in self.checkpoint.architectures if each in ENDS), ())
            own = self.settings.query_prompt, self.settings.document_prompt
            special = self.special(self.checkpoint, prompt, *own)
            return Prompts(tokenizer, limit, self.template, variables, truncation, prompt, end, special)
        if self.template.system and variables.get("instruction") is None:
            variables["instruction"] = declared.instruction
        return ChatPrompts(tokenizer, limit, self.template, variables, truncation)

    def _choose_template(self, *, needed: bool) -> None:
        """Take the caller's template, the family's, or one for scoring that the checkpoint brings."""
        self.template = self._find_template(needed=needed)
        source = None if self.template is None else self.template.source.encode()
        self.facts["template"] = "none" if source is None else hashlib.sha256(source).hexdigest()[:16]

    def _find_template(self, *, needed: bool) -> Template | None:
        if isinstance(self.settings.template, Template) or self.settings.template is None:
            return self.settings.template
        declared, saved = self.checkpoint.declaration, self.checkpoint.chat_template
        if declared.document.chat is not None and saved is not None:
            return ChatTemplate.of(declared.document.chat, saved)
        if declared.modular and declared.document.chat is None:
            return None  # it says that it reads plain pairs
        if self.family is not None and self.family.template is not None:
            return Template.load(self.family.template)
        # Most checkpoints inherit a chat template from the model that they were made of; one for scoring has its roles.
        if saved is not None and any(
            f"{mark}query{mark}" in saved and f"{mark}document{mark}" in saved for mark in "\"'"
        ):
            return Template("chat_template", saved)
        if needed and getattr(self.checkpoint.config, SCORE_TEMPLATE, None) != "none":
            architecture, shipped = self.checkpoint.architectures[0], ", ".join(Template.shipped())
            raise ConfigError(
                f"the score template of {self.checkpoint.name!r} is not known; a {architecture} scores near random "
                f"without it. Pass template=: {shipped}, a file, or the text; or None if it was trained on plain pairs."
            )
        return None

    def _activation(self) -> Activation:
        name = IDENTITY if self.settings.use_activation is False else self._activation_name()
        own = activation(name, f"{self.checkpoint.name!r} (activation_fn; use_activation=False gives logits)")
        self.facts["activation"] = name.rpartition(".")[2].lower()
        if self.family is None or (self.family.logit_scale, self.family.logit_bias) == (1.0, 0.0):
            return own
        scale, bias = self.family.logit_scale, self.family.logit_bias
        self.facts["activation"] += f" of logits * {scale} + {bias}"
        return lambda logits: own(logits * scale + bias)  # without the activation, too: so does vLLM

    def _activation_name(self) -> str:
        """Find the scale of the default score, and say so once where others have another."""
        config, declared = self.checkpoint.config, self.checkpoint.declaration.activation
        classifies = self.checkpoint.architectures[0].endswith("ForSequenceClassification")
        pools = self.checkpoint.declaration.document.pooling is not None
        if (self.checkpoint.declaration.labels if pools else classifies and config.num_labels) == 2:
            return SIGMOID  # the second label's probability
        chosen = config_activation(config) or (declared if classifies or pools else None) or SIGMOID
        if declared is not None and declared != chosen:
            logger.warning(
                "%s: scores are the %s of logits, as vLLM has them; sentence-transformers has their %s. "
                "use_activation=False gives the logits.",
                *(self.checkpoint.name, chosen.rpartition(".")[2], declared.rpartition(".")[2]),
            )
        return chosen
