"""From settings to a model that is ready to score: finds out what a checkpoint is, and puts the parts together."""

import hashlib
import inspect
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rag_rerank.errors import ConfigError
from rag_rerank.families import Family, find_family
from rag_rerank.local.checkpoint.chat import ChatTemplate
from rag_rerank.local.checkpoint.checkpoint import Checkpoint, max_length
from rag_rerank.local.checkpoint.declaration import IDENTITY, SIGMOID, Declaration, Pooling, Route, Side
from rag_rerank.local.checkpoint.files import Files
from rag_rerank.local.hardware import choose_batching, choose_device, choose_dtype
from rag_rerank.local.models.bi_encoder import BiEncoder, Embedder
from rag_rerank.local.models.cross_encoder import (
    Activation,
    Head,
    PairModel,
    Whole,
    classification_head,
    make_head_precise,
    relevance,
)
from rag_rerank.local.models.decoder import answer_head, last_token_head, score_row, token_ids
from rag_rerank.local.models.encoding import Truncation, samples
from rag_rerank.local.models.late_interaction import LateInteraction, TokenEmbedder
from rag_rerank.local.models.layers import activation, config_activation, pool, read_layers
from rag_rerank.local.models.model import Model, ScoreType, special_tokens
from rag_rerank.local.models.prompts import ChatPrompts, Prompts
from rag_rerank.local.models.sequence_to_sequence import FirstStep
from rag_rerank.local.models.vision.processor import ImageProcessor
from rag_rerank.local.models.vision.prompts import ImagePrompts
from rag_rerank.local.models.vision.transformer import MODEL_TYPES, VisionTransformer
from rag_rerank.local.settings import Settings
from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.local.transformer.proof import Proof, Reference, Unproven
from rag_rerank.local.transformer.transformer import (
    Padded,
    Path,
    States,
    Transformer,
    TwoSided,
    Unpadded,
    from_transformers,
    make_transformer,
    prepare,
    rope_limit,
    tested,
)
from rag_rerank.template import Template

logger = logging.getLogger(__name__)

# Arguments of from_pretrained that say where files come from and where weights go, not what they are.
_NO_FACTS = (
    *("cache_dir", "device_map", "force_download", "local_files_only", "low_cpu_mem_usage", "max_memory"),
    *("offload_buffers", "offload_folder", "offload_state_dict", "proxies", "resume_download"),
)


# Names of labels that say "not relevant".
_NEGATIVE = re.compile(r"(?i)(no|not|non|false|negative|0)(?![a-z])|(ir|un|dis|non|not)(relev|relat|simil|match)")

# Held while a model is loaded: transformers changes torch's default dtype for the whole process meanwhile, and of two
# at a time one would put back the other's. A fork waits, so that a child has neither lock nor dtype left half-way.
one_at_a_time = threading.RLock()
if hasattr(os, "register_at_fork"):
    release = one_at_a_time.release
    os.register_at_fork(before=one_at_a_time.acquire, after_in_parent=release, after_in_child=release)


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
        flags = family.vllm_flags.replace("{template}", f"{family.template}")
        raise ConfigError(f"{checkpoint.name!r} runs on vLLM only: vllm serve {checkpoint.name} {flags}")
    kind = _kind(checkpoint)
    differences: dict[Path, float] = {}
    loading, score_type = _load(_Loading(checkpoint, settings, family, device, differences), kind)
    template = loading.template
    asked = f"{checkpoint.name!r}, without a template," if template is None else f"the template {template.name!r}"
    takes = template is not None and template.takes("instruction")
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
        special=None if template is None else special_tokens(checkpoint.tokenizer),
        passages=settings.long_documents == "max-passage",
        document_prompt=settings.document_prompt or "",
        declaration=checkpoint.declaration,
        proof=Proof(max(loading.paths, key=list(get_args(Path)).index), differences),
    )


def _load(loading: "_Loading", kind: str) -> "tuple[_Loading, ScoreType]":
    """Load the weights for the fastest path; where it is not proven, once more for the others: layers were replaced."""
    try:
        return loading, getattr(loading, kind.replace("-", "_"))()
    except Unproven:
        if not loading.unpadded or "unpadded" not in loading.differences:
            raise
    again = _Loading(loading.checkpoint, loading.settings, loading.family, loading.device, loading.differences, False)
    return again, getattr(again, kind.replace("-", "_"))()


def _facts(settings: Settings) -> dict[str, str]:
    """Tell what of the settings can change a score as it is written there.

    Versions of torch and transformers are no facts: they change the last digits, and a run must survive an update.
    """
    variables = settings.variables
    facts: dict[str, Any] = {"instruction": variables.pop("instruction"), "chat_template_kwargs": variables}
    for name in ("query_prompt", "document_prompt", "max_tokens_per_query", "max_tokens_per_doc", "long_documents"):
        facts[name] = getattr(settings, name)
    for name in ("model_kwargs", "tokenizer_kwargs"):
        facts[name] = {key: value for key, value in getattr(settings, name).items() if key not in _NO_FACTS}
    facts |= {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    return {name: json.dumps(value, sort_keys=True, default=repr) for name, value in facts.items()}


def _kind(checkpoint: Checkpoint) -> str:
    """Tell how the checkpoint is run."""
    declared = checkpoint.declaration
    if declared.kind != "cross-encoder":
        return declared.kind
    if declared.document.pooling is not None:
        return "modular"
    architecture = (*checkpoint.architectures, "(none)")[0]
    reads_images = checkpoint.config.model_type in MODEL_TYPES
    if architecture.endswith("ForCausalLM"):
        return "causal"
    if architecture.endswith("ForConditionalGeneration") and reads_images:
        return "vision"
    if architecture.endswith("T5ForConditionalGeneration"):
        return "sequence-to-sequence"
    if not architecture.endswith("ForSequenceClassification"):
        raise ConfigError(
            f"{checkpoint.name!r} is a {architecture}: neither a *ForSequenceClassification nor a *ForCausalLM nor a "
            "sentence-transformers or ColBERT model. Pass a reranker such as cross-encoder/ms-marco-MiniLM-L6-v2."
        )
    if (checkpoint.config.num_labels or 1) > 2:
        raise ConfigError(
            f"{checkpoint.name!r} has {checkpoint.config.num_labels} labels; a reranker has one, or two of which the "
            "second says relevant. It classifies, it does not score relevance."
        )
    labels = list((checkpoint.config.id2label or {}).values())
    if len(labels) == 2 and _NEGATIVE.match(f"{labels[1]}") and not _NEGATIVE.match(f"{labels[0]}"):
        raise ConfigError(
            f"{checkpoint.name!r}: config.json: id2label calls the second of two labels {labels[1]!r}, but the second "
            "is taken for relevance, as rerankers are trained. Swap the rows of the head and the labels."
        )
    return "vision" if reads_images else "classifier"


@dataclass(slots=True)
class _Loading:
    """What is known before the weights are read; one method for each kind of model."""

    checkpoint: Checkpoint
    settings: Settings
    family: Family | None
    device: torch.device
    differences: dict[Path, float]  # from plain transformers, seen on the paths that were tried
    unpadded: bool = True  # whether to try that
    paths: list[Path] = field(default_factory=list)  # that were taken, of each transformer
    facts: dict[str, str] = field(default_factory=dict)  # what was found out on the way that can change a score
    template: Template | None = None  # to prompt with; set on the way
    encoders: dict[str, tuple[PreTrainedModel, Transformer]] = field(default_factory=dict)  # by their folders

    def classifier(self) -> ScoreType:
        """Load a model with a head: that of an encoder is called "classifier", that of a decoder "score"."""
        model = self._model(AutoModelForSequenceClassification)
        score = getattr(model, "score", None)
        self._choose_template(needed=isinstance(score, torch.nn.Linear))
        whole = Whole.of(model, self.checkpoint.tokenizer.pad_token_id, choose_batching(self.device))
        plain = replace(whole, equal=True)
        reference = self._reference(_body(model), lambda sequence: relevance(plain.states([sequence]).tokens))
        make_head_precise(model, self.checkpoint.stored)
        transformer: Padded | Unpadded
        # A checkpoint's own code may read its score from elsewhere (nemotron: the mean): that runs as it is.
        if isinstance(score, torch.nn.Linear) and from_transformers(model):
            weight = score.weight.detach().float()
            head = last_token_head(weight[-1] - weight[0] if len(weight) > 1 else weight[0])
            transformer = self._transformer(_body(model))
        else:
            head, transformer = (lambda states: states.tokens), whole
            if self._may_unpad(_body(model)) and (by_parts := classification_head(model)):
                made = self._transformer(_body(model))
                head, transformer = (by_parts, made) if isinstance(made, Unpadded) else (head, transformer)
        return self._pair_model(model, reference, transformer, head)

    def causal(self) -> ScoreType:
        """Load a model that answers with a word."""
        ids = self._answers()
        model = self._model(AutoModelForCausalLM)
        options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        plain = self._plain(model)

        def logit(sequence: TokenSequence) -> torch.Tensor:
            return relevance(model(**plain.inputs([sequence]), **options).logits[:, -1, ids].float())

        reference = self._reference(_body(model), logit)
        return self._pair_model(model, reference, self._transformer(_body(model)), answer_head(model, ids))

    def sequence_to_sequence(self) -> ScoreType:
        """Load an encoder with a decoder that answers with a word."""
        ids = self._answers()
        model = self._model(AutoModelForSeq2SeqLM)
        pad_id, batching = self.checkpoint.tokenizer.pad_token_id, choose_batching(self.device)
        plain = replace(FirstStep.of(model, pad_id, batching), equal=True)

        def logit(sequence: TokenSequence) -> torch.Tensor:
            return relevance(plain.states([sequence]).tokens[:, ids].float())

        reference = self._reference(model, logit)
        transformer = FirstStep.of(model, pad_id, batching, ids)
        return self._pair_model(model, reference, transformer, lambda states: states.tokens)

    def modular(self) -> ScoreType:
        """Load a transformer with a head of modules."""
        route = self.checkpoint.declaration.document
        head = self._head(route, self.settings.query_prompt)
        model = self._model(AutoModel)
        self._choose_template(needed=not self.checkpoint.declaration.modular)
        plain = self._plain(model)
        reference = self._reference(model, lambda sequence: relevance(head(plain.states([sequence]))))
        transformer = self._transformer(model)
        if isinstance(transformer, Unpadded) and cast("Pooling", route.pooling).modes != ("lasttoken",):
            transformer = replace(transformer, share=False)  # of a shared prefix there is but one state a token
        return self._pair_model(model, reference, transformer, head)

    def vision(self) -> ScoreType:
        """Load a model that reads images, and answers with a word or has a head that transformers has no class for."""
        processor = ImageProcessor.of(self.checkpoint)
        if self.checkpoint.architectures[0].endswith("ForSequenceClassification"):
            self._choose_template(needed=True)
            head = last_token_head(score_row(self.checkpoint).to(self.device))
            model = self._model(AutoModel)
        else:
            ids = self._answers()
            model = self._model(AutoModelForImageTextToText)
            head = answer_head(model, ids)
        body: Any = _body(model)
        plain = self._plain(body.language_model)
        reference = self._reference(body.language_model, lambda sequence: relevance(head(plain.states([sequence]))))
        decoder = self._transformer(body.language_model)
        text = self._proven(reference, decoder, lambda states: relevance(head(states)))
        transformer = VisionTransformer.of(body, processor, text)
        prompts = ImagePrompts(self._prompts(model), transformer.tower)
        return PairModel(prompts, self._activation(), transformer, head)

    def _model(self, auto: Any, checkpoint: Checkpoint | None = None) -> PreTrainedModel:
        options = {"dtype": choose_dtype(self.settings.dtype, self.device), **self.settings.model_kwargs}
        model = (checkpoint or self.checkpoint).model(auto, self.device, **options)
        self.facts |= {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
        return model

    def _pair_model(
        self, model: PreTrainedModel, reference: Reference | None, transformer: Padded | Unpadded, head: Head
    ) -> PairModel:
        proven = self._proven(reference, transformer, lambda states: relevance(head(states)))
        return PairModel(self._prompts(model), self._activation(), proven, head)

    def _reference(
        self,
        body: PreTrainedModel,
        run: Callable[[TokenSequence], torch.Tensor],
        checkpoint: Checkpoint | None = None,
    ) -> Reference | None:
        """Take from plain transformers what is to come out; None if that is not to be verified."""
        prepare(body)
        if not self.settings.verify:
            return None
        checkpoint = checkpoint or self.checkpoint
        try:
            return Reference(body, samples(checkpoint.tokenizer, max_length(checkpoint, body, None, None)), run)
        except torch.OutOfMemoryError:
            raise
        except (IndexError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            architecture = (*self.checkpoint.architectures, type(body).__name__)[0]
            why = (
                f"{error}" if isinstance(error, ConfigError) else f"transformers raises {type(error).__name__}: {error}"
            )
            raise ConfigError(f"{self.checkpoint.name!r} is a {architecture} that can't be scored: {why}") from error

    def _proven(
        self,
        reference: Reference | None,
        transformer: Padded | Unpadded,
        head: Head,
        checkpoint: Checkpoint | None = None,
    ) -> Transformer:
        """Take the transformer, or what it falls back to, if it gives what the reference gave; see `Proof`."""
        checkpoint, asked = checkpoint or self.checkpoint, self.settings.max_length
        limit = rope_limit(transformer.model, asked or max_length(checkpoint, transformer.model, None, None))
        falls_back = [replace(transformer, equal=True)] if isinstance(transformer, Padded) else []
        ways = [each if limit is None else TwoSided(each, limit) for each in (transformer, *falls_back)]
        if reference is None:  # what tests have proven, or what needs no proof
            self.paths.append(ways[-1].path)
            return ways[-1]
        for way in ways:
            seen = reference.difference(way, head)
            self.differences[way.path] = max(seen, self.differences.get(way.path, 0.0))
            if seen <= reference.tolerance:
                self.paths.append(way.path)
                return way
        architecture = (*self.checkpoint.architectures, "model")[0]
        tried = ", ".join(f"{path}: {seen:.2g}" for path, seen in self.differences.items())
        raise Unproven(
            f"{self.checkpoint.name!r} is a {architecture} that can't be scored reliably: what it gives for a pair "
            f"alone and in a batch differs by more than rounding ({reference.tolerance:g} of its size; {tried}). "
            "Use another model; verify=False scores it nevertheless."
        )

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

    def bi_encoder(self) -> ScoreType:
        """Load a sentence-transformers folder of transformer, pooling and more."""
        declared = self.checkpoint.declaration
        if not declared.modular:
            raise ConfigError(
                f"{self.checkpoint.name!r} has no modules.json, so how its token states become an embedding is "
                "unknown. Pass a sentence-transformers model, or a cross-encoder."
            )
        sides = (declared.query, self.settings.query_prompt), (declared.document, self.settings.document_prompt)
        query = self._embedder(*sides[0])
        document = query if sides[0] == sides[1] else self._embedder(*sides[1])
        return BiEncoder(query, document, declared.similarity)

    def late_interaction(self) -> ScoreType:
        """Load a ColBERT: an encoder and a projection, beside it or in folders of its own."""
        declared = self.checkpoint.declaration
        if self.settings.late_interaction == "vllm":
            declared = declared.as_vllm()
        normalizes = self.settings.use_activation is not False
        self.facts["late interaction"] = f"{self.settings.late_interaction}, {normalizes}"
        query = self._token_embedder(declared, "query", self.settings.query_prompt)
        document = self._token_embedder(declared, "document", self.settings.document_prompt)
        return LateInteraction(query, document, declared.similarity == "meanmaxsim")

    def _embedder(self, route: Route, own_prompt: str | None) -> Embedder:
        head = self._head(route, own_prompt, self.checkpoint.declaration.dimensions)
        return Embedder(**self._encoder(route, own_prompt), head=head)

    def _token_embedder(self, declared: Declaration, side: Side, own_prompt: str | None) -> TokenEmbedder:
        route = declared.query if side == "query" else declared.document
        normalize = self.settings.use_activation is not False
        layers = [layer for layer in route.token_layers if normalize or layer.kind != "Normalize"]
        tokenizer = self.checkpoint.at(route).tokenizer
        expansion = declared.expansion if side == "query" else None
        token = expansion and expansion.token
        filler = tokenizer.convert_tokens_to_ids(token) if token else tokenizer.mask_token_id
        if filler is None and token is None:
            filler = tokenizer.eos_token_id
        if expansion is not None and (filler is None or (token and filler == tokenizer.unk_token_id)):
            what = f"a query_expansion with {token or 'its mask'}, which its tokenizer lacks"
            raise ConfigError(f"{self.checkpoint.name!r} declares {what}")
        unpadded = declared.expansion is None or declared.expansion.attend
        return TokenEmbedder(
            **self._encoder(route, own_prompt, declared.markers, unpadded=unpadded),
            layers=read_layers(self.checkpoint.file, layers).to(self.device),
            skipped=_known_ids(tokenizer, declared.skipped_words) if side in declared.skipped_in else frozenset(),
            kept=frozenset(declared.kept_ids) if side == "document" else frozenset(),
            expand_to=expansion.length if expansion else 0,
            expand_with=cast("int", filler or 0),
            attend=expansion is None or expansion.attend,
        )

    def _head(self, route: Route, own_prompt: str | None, dimensions: int | None = None) -> Head:
        """Make a vector of a text's states; of a cross-encoder's, logits."""
        layers = read_layers(self.checkpoint.file, route.layers).to(self.device)
        token_layers = read_layers(self.checkpoint.file, route.token_layers).to(self.device)
        pooling, tokenizer = cast("Pooling", route.pooling), self.checkpoint.at(route).tokenizer
        prompt = route.prompt if own_prompt is None else own_prompt
        skip = 0
        if prompt and not pooling.include_prompt:
            ids = tokenizer(prompt)["input_ids"]
            skip = len(ids) - (ids[-1] in tokenizer.all_special_ids)

        def head(states: States) -> torch.Tensor:
            states = replace(states, tokens=token_layers(states.tokens.float()))
            vectors: torch.Tensor = layers(pool(states, pooling, skip))[:, :dimensions]
            return vectors

        return head

    def _encoder(
        self, route: Route, own_prompt: str | None, markers: Sequence[str] = (), *, unpadded: bool = True
    ) -> dict[str, Any]:
        """Load a transformer without a head, its tokenizer, and what it reads."""
        checkpoint = self.checkpoint.at(route)
        if route.folder not in self.encoders:
            # Of a T5, which reads and writes, sentence-transformers saves the reading half alone.
            reads = checkpoint.config.model_type in {"t5", "mt5", "umt5"}
            model = self._model(AutoModelForTextEncoding if reads else AutoModel, checkpoint)
            plain = self._plain(model, checkpoint)
            reference = self._reference(model, lambda sequence: _all(plain.states([sequence])), checkpoint)
            made = self._transformer(model, checkpoint, unpadded=unpadded)
            self.encoders[route.folder] = model, self._proven(reference, made, _all, checkpoint)
        model, transformer = self.encoders[route.folder]
        marker, prompt = _marker(checkpoint.tokenizer, route.prompt, markers) if own_prompt is None else (None, "")
        return {
            "transformer": transformer,
            "tokenizer": checkpoint.tokenizer,
            "max_length": self._max_length(model, route),
            "prompt": prompt,
            "marker": marker,
            "lower_case": route.lower_case,
        }

    def _plain(self, model: PreTrainedModel, checkpoint: Checkpoint | None = None) -> Padded:
        """Run a model as transformers has it; one sequence at a time is not padded."""
        pad_id = (checkpoint or self.checkpoint).tokenizer.pad_token_id
        return Padded(model, pad_id or 0, choose_batching(self.device), equal=True)

    def _may_unpad(self, body: PreTrainedModel) -> bool:
        """Tell whether to try it: where that is not to be proven here, tests must have done so."""
        return self.unpadded and (tested(body) or (self.settings.verify and from_transformers(body)))

    def _transformer(
        self, model: PreTrainedModel, checkpoint: Checkpoint | None = None, *, unpadded: bool = True
    ) -> Padded | Unpadded:
        pad_id = (checkpoint or self.checkpoint).tokenizer.pad_token_id
        return make_transformer(
            model, pad_id, choose_batching(self.device), unpadded=unpadded and self._may_unpad(model)
        )

    def _max_length(self, model: PreTrainedModel, route: Route) -> int:
        asked = self.settings.max_length
        limit = max_length(self.checkpoint.at(route), model, route.max_length, asked)
        if asked is None and not self.checkpoint.declaration.modular and self.family is not None:
            limit = min(limit, self.family.max_length or limit)
        self.facts["max_length"] = str(limit)
        return limit

    def _prompts(self, model: PreTrainedModel) -> Prompts:
        truncation: Truncation = "longest_first" if self.settings.max_tokens_per_doc is None else "only_second"
        declared, tokenizer = self.checkpoint.declaration, self.checkpoint.tokenizer
        variables = {**tokenizer.special_tokens_map, **self.settings.variables}
        limit = self._max_length(model, declared.document)
        if not isinstance(self.template, ChatTemplate):
            prompt = declared.document.prompt if self.settings.query_prompt is None else ""
            return Prompts(tokenizer, limit, self.template, variables, truncation, prompt)
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
        chat, saved = self.checkpoint.declaration.document.chat, self.checkpoint.tokenizer.chat_template
        if chat is not None and isinstance(saved, str):
            return ChatTemplate.of(chat, saved)
        if self.family is not None and self.family.template is not None:
            return Template.load(self.family.template)
        # Most checkpoints inherit a chat template from the model that they were made of; one for scoring has its roles.
        marks = "\"'" if isinstance(saved, str) else ""
        if any(f"{mark}query{mark}" in saved and f"{mark}document{mark}" in saved for mark in marks):
            return Template("chat_template", saved)
        if needed:
            architecture, shipped = self.checkpoint.architectures[0], ", ".join(Template.shipped())
            raise ConfigError(
                f"the score template of {self.checkpoint.name!r} is not known; a {architecture} scores near random "
                f"without it. Pass template=: {shipped}, a file, or the text; or None if it was trained on plain pairs."
            )
        return None

    def _activation(self) -> Activation:
        name = IDENTITY if self.settings.use_activation is False else self._activation_name()
        own = activation(name, f"{self.checkpoint.name!r}")
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
        if getattr(config, "num_labels", 1) == 2 and classifies and not pools:
            return SIGMOID  # the second label's probability
        chosen = config_activation(config) or (declared if classifies or pools else None) or SIGMOID
        if declared is not None and declared != chosen:
            logger.warning(
                "%s: scores are the %s of logits, as vLLM has them; sentence-transformers has their %s. "
                "use_activation=False gives the logits.",
                *(self.checkpoint.name, chosen.rpartition(".")[2], declared.rpartition(".")[2]),
            )
        return chosen


def _all(states: States) -> torch.Tensor:
    """Give something of all states, ``[sequences, 3 * size]``."""
    return torch.cat([states.first().float(), states.last().float(), states.mean()], dim=1)


def _body(model: PreTrainedModel) -> PreTrainedModel:
    return cast("PreTrainedModel", model.base_model)


def _known_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> frozenset[int]:
    """Find the ids of those words that are tokens: the unknown token is not skipped for a word that is none."""
    ids = {word: cast("int | None", tokenizer.convert_tokens_to_ids(word)) for word in words}
    unknown = tokenizer.unk_token, tokenizer.unk_token_id
    return frozenset(id_ for word, id_ in ids.items() if id_ is not None and (id_ != unknown[1] or word == unknown[0]))


def _marker(tokenizer: PreTrainedTokenizerBase, prompt: str, markers: Sequence[str]) -> tuple[int | None, str]:
    """Split a prompt into the token that it began with in training, if it did with one, and the rest."""
    vocabulary = tokenizer.get_vocab()
    for marker in markers:
        for token in (marker, *marker.split()[:1]):
            if token in vocabulary and prompt.startswith(token):
                return vocabulary[token], prompt[len(token) :]
    return None, prompt
