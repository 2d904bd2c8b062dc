"""From text to tokens: what all score types have in common."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from rag_rerank.errors import BackendRejected, ConfigError
from rag_rerank.local.transformer.batching import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rag_rerank.local.models.prompts import Prompts
    from rag_rerank.local.transformer.transformer import Transformer

Truncation = Literal["longest_first", "only_second"]


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    pairs: list[str] | None,
    max_length: int,
    truncation: Truncation = "longest_first",
    *,
    special: bool = False,
) -> list[TokenSequence]:
    """Tokenise texts, or pairs of texts, in one call and without padding.

    Text that spells a special token (``[SEP]`` in a document) stays text, unless a prompt does (`special`). Pairs are
    cut from the longer side, as vLLM does for ``truncate_prompt_tokens=-1``, or from the second only, as where
    ``max_tokens_per_doc`` is set too.
    BackendRejected for a text of no tokens: without special ones, an empty one has no state to be read.
    """
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        pairs,
        truncation=truncation if pairs else True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        split_special_tokens=not special,
        verbose=False,
    )
    types = encoded.get("token_type_ids") or [None] * len(texts)
    truncated = [bool(encoding.overflowing) for encoding in encoded.encodings or ()] or [False] * len(texts)
    rows = zip(encoded["input_ids"], types, truncated, strict=True)
    made = [TokenSequence(ids, kinds, truncated=cut) for ids, kinds, cut in rows]
    if not all(each.ids for each in made):
        raise BackendRejected("a text has no token that the model reads", remedy="Leave it out.")
    return made


def places(tokenizer: "PreTrainedTokenizerBase", text: str, **options: bool) -> list[tuple[int, int]]:
    """Find where in a text each of its tokens begins and ends."""
    if not tokenizer.is_fast:
        raise ConfigError("its tokenizer is written in Python and can't tell where to cut: set no limit but max_length")
    found: list[tuple[int, int]] = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options
    )["offset_mapping"]
    return found


def truncate(tokenizer: "PreTrainedTokenizerBase", text: str, max_tokens: int) -> str:
    """Take the beginning of `text` that is at most `max_tokens` tokens long, special tokens not counted.

    Cut between characters, because decoded tokens may encode to more of them, as vLLM's ``max_tokens_per_doc`` does
    (vLLM 0.32, ``entrypoints/pooling/scoring/utils.py``).
    """
    if max_tokens <= 0:
        return ""
    while text:
        offsets = places(tokenizer, text)
        if len(offsets) <= max_tokens:
            break
        # A character may take several tokens, all with its offsets: it goes as a whole.
        end = min(offsets[max_tokens - 1][1], offsets[max_tokens][0])
        text = text[: min(end, len(text) - 1)]
    return text


def samples(
    tokenizer: "PreTrainedTokenizerBase", longest: int, *, pairs: bool, padding: int | None = None
) -> list[TokenSequence]:
    """Make a short pair or text, a longer one of the same query, and the first again: what a model is proven on.

    None ends with the tokenizer's padding, or the config's, which some take for none of the text.
    """
    query = "who lives in the city of 1 million people, and when was it founded by the old king?"
    sizes = {"a king": 29, "an old king lives there. " * 20: 67}  # tokens, at most; odd, for some pool neighbours
    short, long = (
        encode(tokenizer, [query if pairs else f"{query} {text}"], [text] if pairs else None, min(size, longest))[0]
        for text, size in sizes.items()
    )
    while len(short.ids) > 1 and short.ids[-1] in (tokenizer.pad_token_id, padding):
        short, long = (replace(each, ids=each.ids[:-1], types=each.types and each.types[:-1]) for each in (short, long))
    return [replace(each, group="proof") for each in (short, long, short)]


@dataclass(frozen=True, slots=True, eq=False)
class TextEncoder:
    """What turns the texts of one side, queries or documents, into states."""

    transformer: "Transformer"
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int  # of a sequence, in tokens
    prompt: str = ""  # before each text
    special: bool = False  # whether the prompt, or the caller's, spells special tokens
    chat: "Prompts | None" = None  # what renders each text with a chat template, the prompt in it

    def space(self) -> int:
        """Count the tokens of a text that are read."""
        if self.chat is not None:
            return self.chat.document_space([""])[0]
        prompt: list[int] = self.tokenizer(self.prompt, add_special_tokens=False)["input_ids"] if self.prompt else []
        return self.max_length - self.tokenizer.num_special_tokens_to_add() - len(prompt)

    def encode(self, texts: list[str]) -> list[TokenSequence]:
        """Tokenise texts, each behind the prompt or rendered."""
        if self.chat is not None:
            return self.chat.sequences([""], texts)
        texts = [self.prompt + text for text in texts]
        return encode(self.tokenizer, texts, None, self.max_length, special=self.special)
