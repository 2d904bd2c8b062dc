"""Documents longer than the model's window: scored as overlapping passages, by their best one.

MaxP of Dai and Callan, "Deeper Text Understanding for IR with Contextual Neural Language Modeling", SIGIR 2019
(https://arxiv.org/abs/1905.09217).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rag_rerank.inputs.multimodal import Prepared
from rag_rerank.local.models.encoding import places

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where a query leaves less than this for the document, its passages would be snippets: such a pair is cut instead.
MIN_SPACE = 32


def split_document(
    tokenizer: "PreTrainedTokenizerBase", document: Prepared, space: int, prompt: str = ""
) -> Sequence[Prepared]:
    """Split a document, if it is text, into passages of at most `space` tokens, each behind the document's prompt."""
    if not isinstance(document, str):
        return [document]
    text = document.removeprefix(prompt)
    if prompt and len(text) < len(document):
        space -= len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if space < MIN_SPACE:
        return [document]
    prompt = document[: len(document) - len(text)]
    return [prompt + passage for passage in passages(tokenizer, text, space)]


def passages(tokenizer: "PreTrainedTokenizerBase", text: str, size: int) -> list[str]:
    """Cut a text into passages of `size` tokens that overlap half of the one before; the last ends with the text."""
    offsets = places(tokenizer, text, split_special_tokens=True)
    if len(offsets) <= size:
        return [text]
    step = size // 2
    starts = [*range(0, len(offsets) - size, step), len(offsets) - size]
    return [text[offsets[start][0] : offsets[start + size - 1][1]] for start in starts]
