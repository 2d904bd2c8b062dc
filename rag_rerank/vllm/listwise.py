"""Lists that are too long for one prompt of a listwise model: in blocks, compared as the model's own code does.

Scores of different blocks can't be compared. vLLM's ``/pooling`` gives the vectors that they are made of.
"""

import math
import operator
from collections.abc import Sequence

from rag_rerank.errors import ConfigError
from rag_rerank.families import LIST_DOCUMENTS
from rag_rerank.vllm.wire import Options

Vector = Sequence[float]


def check_options(options: Options) -> None:
    """Raise ConfigError for what ``/pooling`` can't be told."""
    instruction = options.instruction or (options.chat_template_kwargs or {}).get("instruction")
    if instruction or (options.max_tokens_per_query, options.max_tokens_per_doc) != (None, None):
        raise ConfigError(
            "on a server, a listwise model takes instruction, max_tokens_per_query and max_tokens_per_doc only with up "
            f"to {LIST_DOCUMENTS} documents; leave them out, or pass fewer"
        )


def compared(blocks: Sequence[Sequence[Vector]]) -> list[float]:
    """Compare documents with the mean of the blocks' queries, the last vectors, weighted by each block's best score."""
    weights = [max(1 + _cosine(document, block[-1]) for document in block[:-1]) for block in blocks]
    numbers = zip(*(block[-1] for block in blocks), strict=True)
    query = [_product(weights, column) for column in numbers]
    return [_cosine(document, query) for block in blocks for document in block[:-1]]


def _cosine(first: Vector, second: Vector) -> float:
    return _product(first, second) / max(1e-8, math.hypot(*first) * math.hypot(*second))


def _product(first: Vector, second: Vector) -> float:
    return math.fsum(map(operator.mul, first, second))
