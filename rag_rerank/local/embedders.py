"""Models that read queries and documents apart: bi-encoders and late interaction, as the checkpoint declares them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from tokenizers import AddedToken
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedModel, PreTrainedTokenizerBase

from rag_rerank.errors import ConfigError
from rag_rerank.local.checkpoint.chat import ChatTemplate
from rag_rerank.local.checkpoint.checkpoint import Checkpoint
from rag_rerank.local.checkpoint.declaration import Chat, Declaration, Route, Side
from rag_rerank.local.models.bi_encoder import BiEncoder, Embedder
from rag_rerank.local.models.late_interaction import LateInteraction, TokenEmbedder
from rag_rerank.local.models.layers import read_layers
from rag_rerank.local.models.model import ScoreType
from rag_rerank.local.models.prompts import ChatPrompts
from rag_rerank.local.transformer.transformer import States, Transformer
from rag_rerank.local.weights import Loading


@dataclass(slots=True)
class EmbedderLoading(Loading):
    """One method for each kind."""

    encoders: dict[str, tuple[PreTrainedModel, Transformer]] = field(default_factory=dict)  # by their folders

    def bi_encoder(self) -> ScoreType:
        """Load a sentence-transformers folder of transformer, pooling and more."""
        declared = self.checkpoint.declaration
        if not declared.modular:
            raise ConfigError(
                f"{self.checkpoint.name!r} has no modules.json, so how its token states become an embedding is "
                "unknown. Pass a sentence-transformers model, or a cross-encoder."
            )
        own = self.settings.query_prompt, self.settings.document_prompt
        query = self._embedder("query", declared.query, own[0])
        alike = (declared.query, own[0]) == (declared.document, own[1]) and query.chat is None
        document = query if alike else self._embedder("document", declared.document, own[1])
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

    def _embedder(self, side: Side, route: Route, own_prompt: str | None) -> Embedder:
        head = self.head(route, own_prompt, self.device, self.checkpoint.declaration.dimensions)
        return Embedder(**self._encoder(side, route, own_prompt), head=head)

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
        if expansion is not None and expansion.fixed and tokenizer.padding_side == "left":
            what = "a query_expansion, but the padding_side of its tokenizer is left; supported is right"
            raise ConfigError(f"{self.checkpoint.name!r} declares {what}")
        if expansion is not None and route.chat is not None:
            what = "a query_expansion and a chat template; its length would cut the end of the template"
            raise ConfigError(f"{self.checkpoint.name!r} declares {what}")
        unpadded = declared.expansion is None or declared.expansion.attend
        return TokenEmbedder(
            **self._encoder(side, route, own_prompt, declared.markers, unpadded=unpadded),
            layers=read_layers(self.checkpoint.files, layers).to(self.device),
            skipped=_known_ids(tokenizer, declared.skipped_words) if side in declared.skipped_in else frozenset(),
            kept=frozenset(declared.kept_ids) if side == "document" else frozenset(),
            expand_to=expansion.length if expansion else 0,
            expand_with=cast("int", filler or 0),
            attend=expansion is None or expansion.attend,
        )

    def _encoder(
        self, side: Side, route: Route, own_prompt: str | None, markers: Sequence[str] = (), *, unpadded: bool = True
    ) -> dict[str, Any]:
        """Load a transformer without a head, its tokenizer, and what it reads."""
        checkpoint = self.checkpoint.at(route)
        if route.folder not in self.encoders:
            # Of a T5, which reads and writes, sentence-transformers saves the reading half alone.
            reads = checkpoint.config.model_type in {"t5", "mt5", "umt5"}
            model = self.load(AutoModelForTextEncoding if reads else AutoModel, checkpoint)
            made, _ = self.run(
                model, lambda each: self.parts(each, _all, checkpoint, share=False), checkpoint, unpadded=unpadded
            )
            self.encoders[route.folder] = model, made
        model, transformer = self.encoders[route.folder]
        _make_special(checkpoint.tokenizer, markers)
        limit, prompt = self.max_length(model, route), route.prompt if own_prompt is None else ""
        return {
            "transformer": transformer,
            "tokenizer": checkpoint.tokenizer,
            "max_length": limit,
            "prompt": prompt,
            "special": self.special(checkpoint, route.prompt if own_prompt is None else own_prompt),
            "chat": None if route.chat is None else self._chat(side, route.chat, checkpoint, limit, prompt),
        }

    def _chat(self, side: Side, chat: Chat, checkpoint: Checkpoint, limit: int, prompt: str) -> ChatPrompts:
        """Make what renders the texts of one side; the prompt is the system's message."""
        source = checkpoint.chat_template
        if source is None:
            what = "messages (modality_config), but its tokenizer has no chat template"
            raise ConfigError(f"{self.checkpoint.name!r} declares {what}")
        self.special_prompts = True
        tokenizer = checkpoint.tokenizer
        variables = {**tokenizer.special_tokens_map, **self.settings.variables, "instruction": prompt or None}
        return ChatPrompts(tokenizer, limit, ChatTemplate.of_texts(chat, source, side), variables)


def _all(states: States) -> torch.Tensor:
    """Give something of all states, ``[sequences, 3 * size]``."""
    return torch.cat([states.first().float(), states.last().float(), states.mean()], dim=1)


def _known_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> frozenset[int]:
    """Find the ids of those words that are tokens: the unknown token is not skipped for a word that is none."""
    ids = set(cast("list[int]", tokenizer.convert_tokens_to_ids(list(words)))) - {None}
    return frozenset(ids if tokenizer.unk_token in words else ids - {tokenizer.unk_token_id})


def _make_special(tokenizer: PreTrainedTokenizerBase, markers: Sequence[str]) -> None:
    """Make special tokens of the prompts, or their first words, that a vocabulary has, as sentence-transformers does.

    They were tokens of their own in training, though the tokenizer would take them apart.
    """
    vocabulary = tokenizer.get_vocab()
    for marker in markers:
        token = next((token for token in (marker, *marker.split()[:1]) if token in vocabulary), marker)
        if token in vocabulary and tokenizer.tokenize(token) != [token]:
            tokenizer.add_tokens([AddedToken(token, normalized=False)], special_tokens=True)
