"""A checkpoint's weights, and the way in which its transformer is run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast, get_args

import torch
from transformers import PreTrainedModel

from rag_rerank.errors import ConfigError
from rag_rerank.families import Family
from rag_rerank.local.checkpoint.checkpoint import Checkpoint, max_length
from rag_rerank.local.checkpoint.declaration import Pooling, Route
from rag_rerank.local.hardware import choose_batching, choose_dtype
from rag_rerank.local.models.encoding import samples
from rag_rerank.local.models.layers import pool, read_layers
from rag_rerank.local.models.model import special_tokens
from rag_rerank.local.settings import Settings
from rag_rerank.local.transformer.batching import Batching
from rag_rerank.local.transformer.proof import FAILURES, Parts, Proof, Unproven, prove
from rag_rerank.local.transformer.transformer import (
    Head,
    Padded,
    Path,
    States,
    Transformer,
    can_unpad,
    looks_ahead,
    prepare,
    rope_limit,
    tested,
)
from rag_rerank.template import Template


@dataclass
class Loading:
    """What is known before the weights are read, and what was found out since."""

    checkpoint: Checkpoint
    settings: Settings
    family: Family | None
    device: torch.device
    proofs: list[Proof] = field(default_factory=list)  # of each transformer
    facts: dict[str, str] = field(default_factory=dict)  # what was found out on the way that can change a score
    template: Template | None = None  # to prompt with; set on the way
    models: list[PreTrainedModel] = field(default_factory=list)  # all that were loaded
    special_prompts: bool = False  # whether any spells a special token

    @cached_property
    def batching(self) -> Batching:
        """How much is run at once: one for all the ways that a model is tried in, for it takes 2 ms to find."""
        return choose_batching(self.device)

    @property
    def proof(self) -> Proof:
        """What was seen of all transformers: the slowest way, and the largest differences."""
        differences: dict[Path, float] = {}
        for proof in self.proofs:
            differences |= {path: max(seen, differences.get(path, 0.0)) for path, seen in proof.differences.items()}
        return Proof(max((proof.path for proof in self.proofs), key=get_args(Path).index), differences)

    def load(self, auto: Any, checkpoint: Checkpoint | None = None) -> PreTrainedModel:
        """Load the weights with one of transformers' classes."""
        options = {"dtype": choose_dtype(self.settings.dtype, self.device), **self.settings.model_kwargs}
        model = (checkpoint or self.checkpoint).model(auto, self.device, **options)
        self.facts |= {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
        self.models.append(model)
        return model

    def own_weights(self) -> None:
        """Copy those that are still mapped from a file: whoever writes over it would change the model that runs.

        Called when all is packed, which copies, too: what is left are embeddings and small tensors.
        """
        for tensor in [each for model in self.models for each in (*model.parameters(), *model.buffers())]:
            if type(tensor.data) is torch.Tensor and not tensor.untyped_storage().resizable():
                tensor.data = tensor.data.clone()

    def plain(
        self, model: PreTrainedModel, checkpoint: Checkpoint | None = None, run_by: type[Padded] = Padded
    ) -> Padded:
        """Run a transformer as transformers wrote it."""
        pad_id = (checkpoint or self.checkpoint).tokenizer.pad_token_id
        return run_by(model, pad_id or 0, self.batching)

    def parts(
        self, model: PreTrainedModel, head: Head, checkpoint: Checkpoint | None = None, *, share: bool = True
    ) -> Parts:
        """Take apart a transformer that has a head of ours."""
        return Parts(model, head, self.plain(model, checkpoint), head, share=share)

    def run(
        self,
        model: PreTrainedModel,
        take_apart: Callable[[Any], Parts],
        checkpoint: Checkpoint | None = None,
        *,
        unpadded: bool = True,
    ) -> tuple[Transformer, Head]:
        """Choose the fastest way to run a model that gives what plain transformers give, and take it; see `prove`."""
        checkpoint, asked, verify = checkpoint or self.checkpoint, self.settings.max_length, self.settings.verify
        parts = take_apart(model)
        body = parts.body
        prepare(body)
        longest = max_length(checkpoint, body, None, None)
        limit = rope_limit(body, asked or max(longest, checkpoint.route.max_length or 0))
        # What is not to be proven, tests must have proven.
        unpadded = unpadded and parts.head is not None and can_unpad(body) and (verify or tested(body))
        # Doge and DeepSeek V3.2 keep the best keys of a long row, its padding among them.
        picks = any(hasattr(body.config, name) for name in ("keep_window_size", "index_topk"))
        ways: dict[Path, bool] = {"unpadded": unpadded, "padded": verify and not picks, "equal lengths": True}
        paths = [path for path, possible in ways.items() if possible]
        differences: Mapping[Path, float] = {}
        if verify:
            pairs = checkpoint.declaration.kind == "cross-encoder"
            try:
                padding = None if looks_ahead(body) else getattr(body.config, "pad_token_id", None)
                texts = samples(checkpoint.tokenizer, longest, pairs=pairs, padding=padding)
                proof = prove(model, take_apart, texts, paths, limit)
            except torch.OutOfMemoryError:
                raise
            except FAILURES as error:
                kind = Unproven if isinstance(error, Unproven) else ConfigError
                raised = "" if isinstance(error, ConfigError) else f"transformers raises {type(error).__name__}: "
                architecture = (*checkpoint.architectures, type(body).__name__)[0]
                raise kind(f"{checkpoint.name!r} is a {architecture} that can't be scored: {raised}{error}") from error
            paths, differences = [proof.path], proof.differences
        transformer, head = take_apart(model).way(paths[0])
        self.proofs.append(Proof(transformer.path, differences))
        return replace(transformer, limit=limit), head

    def max_length(self, model: PreTrainedModel, route: Route) -> int:
        """Find the longest input in tokens, and keep it as a fact."""
        asked = self.settings.max_length
        limit = max_length(self.checkpoint.at(route), model, route.max_length, asked)
        if asked is None and not self.checkpoint.declaration.modular and self.family is not None:
            limit = min(limit, self.family.max_length or limit)
        self.facts["max_length"] = str(limit)
        return limit

    def special(self, checkpoint: Checkpoint, *prompts: str | None) -> bool:
        """Tell whether a prompt spells special tokens: there they count, and no text may spell any."""
        pattern = special_tokens(checkpoint.tokenizer)
        found = pattern is not None and any(pattern.search(prompt or "") for prompt in prompts)
        self.special_prompts = self.special_prompts or found
        return found

    def head(self, route: Route, own_prompt: str | None, device: torch.device, dimensions: int | None = None) -> Head:
        """Make a vector of a text's states; of a cross-encoder's, logits."""
        layers = read_layers(self.checkpoint.files, route.layers).to(device)
        token_layers = read_layers(self.checkpoint.files, route.token_layers).to(device)
        pooling, tokenizer = cast("Pooling", route.pooling), self.checkpoint.at(route).tokenizer
        prompt = route.prompt if own_prompt is None else own_prompt
        skip = 0
        if prompt and not pooling.include_prompt and route.chat is None:  # in messages sentence-transformers counts all
            ids = tokenizer(prompt)["input_ids"]
            skip = len(ids) - (ids[-1] in tokenizer.all_special_ids)

        def head(states: States) -> torch.Tensor:
            states = replace(states, tokens=token_layers(states.tokens.float()))
            vectors: torch.Tensor = layers(pool(states, pooling, skip))[:, :dimensions]
            return vectors

        return head
