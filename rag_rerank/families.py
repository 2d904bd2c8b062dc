"""What rerankers' checkpoints don't say themselves: the prompts of older ones, and what vLLM must be told.

One table for all who need to know, ``families.toml``: `LocalScorer` goes by it where the checkpoint declares nothing,
and ``rag-rerank template list`` and the guide print it. It holds facts of the models, from their cards; a model that is
not in it is never guessed at.
"""

import contextlib
import difflib
import functools
import re
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from rag_rerank.errors import ConfigError

Method = Literal["head", "two-token", "single-token", "bi-encoder", "late-interaction", "listwise"]


@dataclass(frozen=True, slots=True)
class Family:
    """Models that are prompted, scored and served alike.

    Attributes:
        name: Unique; where the family has a template of its own, that template's name too.
        models: Hub ids, with the wildcards of `fnmatch`.
        card: The model card that prompt, score and licence are taken from.
        licence: Of the weights.
        size: How many parameters its models have.
        architectures: What ``architectures`` in the checkpoint's config.json says; empty where it may say anything.
        template: The file in ``rag_rerank/templates``, which `Template.load` finds; None where query and document are
            encoded as a pair, or alone.
        method: Where the score comes from: a classification ``head``; the next token's logits, ``two-token`` for
            logit(true) - logit(false) and ``single-token`` for logit(true); the cosine of two embeddings; the sum of
            every query token's best match; or ``listwise``, the cosine of two states in a prompt of all documents.
        tokens: (false, true) or (true,), as ``classifier_from_token`` wants them: each one vocabulary entry.
        instruction: What the template says when no instruction is given; None where it then says nothing.
        logit_scale: The score is sigmoid(logit * logit_scale + logit_bias).
        logit_bias: See `logit_scale`. A vLLM server that applies the two does so under use_activation=false as well.
        max_length: How many tokens of prompt the card's code keeps, else how many the model takes; None where models
            of the family differ.
        local: In which way `LocalScorer` runs it, as `Proof.path`; empty where it needs a vLLM server.
        served: Whether vLLM serves it.
        vllm_flags: What follows ``vllm serve MODEL``. ``{template}`` stands for the template's path; put it in with
            `str.replace`, since the JSON in the flags has braces too.
        by_architecture: Whether the architecture alone tells the family, whatever the model is called.
        note: What else to know.
    """

    name: str
    models: tuple[str, ...]
    card: str
    licence: str
    size: str
    method: Method
    architectures: tuple[str, ...] = ()
    template: str | None = None
    tokens: tuple[str, ...] = ()
    instruction: str | None = None
    logit_scale: float = 1.0
    logit_bias: float = 0.0
    max_length: int | None = None
    local: Literal["unpadded", "padded", ""] = "unpadded"
    served: bool = True
    vllm_flags: str = ""
    by_architecture: bool = False
    note: str = ""

    def serve(self, model: str) -> list[str]:
        """Write the commands that serve a model of this family on vLLM, for a shell."""
        command = f"vllm serve {shlex.quote(model)} {self.vllm_flags}".strip()
        if self.template is None or "{template}" not in command:
            return [command]
        show = f"rag-rerank template show {self.name} > {self.template}"
        return [show, command.replace("{template}", self.template)]


def _read() -> tuple[Family, ...]:
    families: list[Family] = []
    for row in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["family"]:
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        families.append(Family(**values))
    return tuple(families)


FAMILIES = _read()
"""All families. Where two match a name equally well, the first is it."""

_BY_NAME = {family.name: family for family in FAMILIES}


def find_family(model_name: str, architectures: Sequence[str] = ()) -> Family | None:
    """Find the family of a model by its name.

    Args:
        model_name: A hub id, or a folder that is called as the model is (a folder of the hub's cache, too).
        architectures: From its config.json. They tell a causal model from the classifier that was made of it, and a
            namesake from the model that is meant. Empty where not known yet.

    Returns:
        None for a model that is not in the table: similar names mean nothing, but some architectures are one family's.
    """
    name = _own_name(model_name)
    best, best_length = None, 0
    for family in FAMILIES:
        if family.by_architecture and set(architectures) & set(family.architectures):
            return family
        if architectures and family.architectures and not set(architectures) & set(family.architectures):
            continue
        for pattern in map(_own_name, family.models):
            # The longer of two patterns says more: "...-seq-cls" is not just any Qwen3-Reranker.
            if len(pattern) > best_length and fnmatchcase(name, pattern):
                best, best_length = family, len(pattern)
    return best


def family(name: str) -> Family:
    """Get a family by its own name.

    Raises:
        ConfigError: There is none.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    similar = difflib.get_close_matches(name.lower(), _BY_NAME, n=1)
    meant = f" Did you mean {similar[0]!r}?" if similar else ""
    raise ConfigError(f"there is no family {name!r}.{meant} Known are {', '.join(_BY_NAME)}")


@functools.lru_cache(64)
def is_listwise(model: str) -> bool:
    """Tell whether a model scores the documents of a query together: by the folder's config.json, else by its name."""
    with contextlib.suppress(OSError, ValueError):  # it may lie on another machine, or be a hub id
        if b"JinaForRanking" in Path(model, "config.json").read_bytes():
            return True
    return "jina-reranker-v3" in model.lower()


def _own_name(model_name: str) -> str:
    """Strip a model's name of its owner and the folders above it, in lower case."""
    parts = [part for part in re.split(r"[/\\]", model_name) if part]
    for part in parts:
        if part.startswith("models--"):  # the hub's cache: models--OWNER--NAME/snapshots/REVISION
            return part.rpartition("--")[2].lower()
    return parts[-1].lower() if parts else ""
