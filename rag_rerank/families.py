"""The reranker families that vLLM's score API scores: how each is prompted, scored and served.

One table for all who need to know: `LocalScorer` picks prompt and score type from it, ``rag-rerank template list`` and
the README print it. It holds facts of the models, from their cards; a model that is not in it is never guessed at.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from rag_rerank.errors import ConfigError

Method = Literal["head", "two-token", "single-token", "bi-encoder", "late-interaction"]


@dataclass(frozen=True, slots=True)
class Family:
    """Models that are prompted, scored and served alike.

    Attributes:
        name: Unique; where the family has a template of its own, that template's name too.
        models: Hub ids, with the wildcards of `fnmatch`.
        card: The model card that prompt and score are taken from.
        architectures: What ``architectures`` in the checkpoint's config.json says; empty where it may say anything.
        template: The file in ``rag_rerank/templates``, which `Template.load` finds; None where query and document are
            encoded as a pair, or alone.
        method: Where the score comes from: a classification ``head``; the next token's logits, ``two-token`` for
            logit(true) - logit(false) and ``single-token`` for logit(true); the cosine of two embeddings; or the sum
            of every query token's best match.
        tokens: (false, true) or (true,), as ``classifier_from_token`` wants them: each one vocabulary entry.
        instruction: What the template says when no instruction is given; None where it then says nothing.
        logit_scale: The score is sigmoid(logit * logit_scale + logit_bias).
        logit_bias: See `logit_scale`. A vLLM server that applies the two does so under use_activation=false as well.
        max_length: How many tokens of prompt the card's code keeps, else how many the model takes; None where models
            of the family differ.
        local: Whether `LocalScorer` runs it; if not, it needs a vLLM server.
        vllm_flags: What follows ``vllm serve MODEL``. ``{template}`` stands for the template's path; put it in with
            `str.replace`, since the JSON in the flags has braces too.
        note: What else to know.
    """

    name: str
    models: tuple[str, ...]
    card: str
    method: Method
    architectures: tuple[str, ...] = ()
    template: str | None = None
    tokens: tuple[str, ...] = ()
    instruction: str | None = None
    logit_scale: float = 1.0
    logit_bias: float = 0.0
    max_length: int | None = None
    local: bool = True
    vllm_flags: str = ""
    note: str = ""


_TEMPLATE_FLAG = "--chat-template {template}"
_TRUE_LOGIT = '"method": "no_post_processing"'  # vLLM's names for the methods
_LOGIT_DIFFERENCE = '"method": "from_2_way_softmax"'
_QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

# Where two families match a name equally well, the first is it.
FAMILIES: tuple[Family, ...] = (
    Family(
        name="qwen3-reranker",
        models=("Qwen/Qwen3-Reranker-*",),
        card="https://huggingface.co/Qwen/Qwen3-Reranker-0.6B",
        method="two-token",
        architectures=("Qwen3ForCausalLM",),
        template="qwen3-reranker.jinja",
        tokens=("no", "yes"),
        instruction=_QWEN3_INSTRUCTION,
        max_length=8192,
        vllm_flags='--hf-overrides \'{"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": '
        f'["no", "yes"], "is_original_qwen3_reranker": true}}\' {_TEMPLATE_FLAG}',
        note="Without its template it ranks at random.",
    ),
    Family(
        name="qwen3-reranker-seq-cls",
        models=("tomaarsen/Qwen3-Reranker-*-seq-cls", "Qwen/Qwen3-Reranker-*"),
        card="https://huggingface.co/tomaarsen/Qwen3-Reranker-0.6B-seq-cls",
        method="head",
        architectures=("Qwen3ForSequenceClassification",),
        template="qwen3-reranker.jinja",
        instruction=_QWEN3_INSTRUCTION,
        max_length=8192,
        vllm_flags=_TEMPLATE_FLAG,
        note="Qwen3-Reranker with logit(yes) - logit(no) as its head. The prompt is the same.",
    ),
    Family(
        name="qwen3-vl-reranker",
        models=("Qwen/Qwen3-VL-Reranker-*",),
        card="https://huggingface.co/Qwen/Qwen3-VL-Reranker-2B",
        method="two-token",
        architectures=("Qwen3VLForConditionalGeneration",),
        template="qwen3-vl-reranker.jinja",
        tokens=("no", "yes"),
        instruction="Given a search query, retrieve relevant candidates that answer the query.",
        max_length=10240,
        vllm_flags='--hf-overrides \'{"architectures": ["Qwen3VLForSequenceClassification"], "classifier_from_token": '
        f'["no", "yes"], "is_original_qwen3_reranker": true}}\' --max-model-len 4096 {_TEMPLATE_FLAG}',
        note="Images with the same template; videos on vLLM only. The card's code has limits of its own for the size "
        "of images; vLLM and LocalScorer go by the checkpoint's.",
    ),
    Family(
        name="mxbai-rerank-v2",
        models=("mixedbread-ai/mxbai-rerank-*-v2",),
        card="https://huggingface.co/mixedbread-ai/mxbai-rerank-large-v2",
        method="two-token",
        architectures=("Qwen2ForCausalLM",),
        template="mxbai-rerank-v2.jinja",
        tokens=("0", "1"),
        max_length=8192,
        vllm_flags='--hf-overrides \'{"architectures": ["Qwen2ForSequenceClassification"], "classifier_from_token": '
        f'["0", "1"], {_LOGIT_DIFFERENCE}}}\' {_TEMPLATE_FLAG}',
        note="The package mxbai-rerank tokenizes the parts one by one: same text, but a text that ends in a mark can "
        "join the line break behind it here.",
    ),
    Family(
        name="bge-reranker-v2-gemma",
        models=("BAAI/bge-reranker-v2-gemma",),
        card="https://huggingface.co/BAAI/bge-reranker-v2-gemma",
        method="single-token",
        architectures=("GemmaForCausalLM",),
        template="bge-reranker-v2-gemma.jinja",
        tokens=("Yes",),
        instruction="Given a query A and a passage B, determine whether the passage contains an answer to the query "
        "by providing a prediction of either 'Yes' or 'No'.",
        max_length=1024,
        vllm_flags='--hf-overrides \'{"architectures": ["GemmaForSequenceClassification"], "classifier_from_token": '
        f'["Yes"], {_TRUE_LOGIT}}}\' {_TEMPLATE_FLAG}',
        note="FlagEmbedding gives the logit unless told to normalize; use_activation=False is that.",
    ),
    Family(
        name="zerank-2",
        models=("zeroentropy/zerank-*",),
        card="https://huggingface.co/zeroentropy/zerank-2-reranker",
        method="single-token",
        architectures=("Qwen3ForCausalLM",),
        template="zerank-2.jinja",
        tokens=("Yes",),
        logit_scale=0.2,
        max_length=32768,
        vllm_flags='--runner pooling --pooler-config \'{"logit_sigma": 5}\' --hf-overrides \'{"architectures": '
        f'["Qwen3ForSequenceClassification"], "classifier_from_token": ["Yes"], {_TRUE_LOGIT}}}\' {_TEMPLATE_FLAG}',
        note="zerank-1, too, is prompted so, but only zerank-2 follows instructions.",
    ),
    Family(
        name="zerank-2-seq-cls",
        models=("polaria-tech/zerank-2-reranker-vllm",),
        card="https://huggingface.co/polaria-tech/zerank-2-reranker-vllm",
        method="head",
        architectures=("Qwen3ForSequenceClassification",),
        template="zerank-2.jinja",
        max_length=32768,
        vllm_flags=f"--runner pooling {_TEMPLATE_FLAG}",
        note="zerank-2 with the division by 5 in the weights of its head.",
    ),
    Family(
        name="ctxl-rerank-v2",
        models=(
            "ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b*",
            "ContextualAI/ctxl-rerank-v2-instruct-multilingual-2b*",
        ),
        card="https://huggingface.co/ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b",
        method="single-token",
        architectures=("Qwen3ForCausalLM",),
        template="ctxl-rerank-v2.jinja",
        tokens=("!",),
        max_length=32768,
        vllm_flags='--runner pooling --hf-overrides \'{"architectures": ["Qwen3ForSequenceClassification"], '
        f'"classifier_from_token": ["!"], {_TRUE_LOGIT}}}\' {_TEMPLATE_FLAG}',
        note="The score is the logit of token 0, which happens to be an exclamation mark. The card gives the logit; "
        "use_activation=False is that.",
    ),
    Family(
        name="ctxl-rerank-v2-6b",
        models=("ContextualAI/ctxl-rerank-v2-instruct-multilingual-6b*",),
        card="https://huggingface.co/ContextualAI/ctxl-rerank-v2-instruct-multilingual-6b",
        method="single-token",
        architectures=("MistralForCausalLM",),
        template="ctxl-rerank-v2.jinja",
        tokens=("<unk>",),
        max_length=32768,
        vllm_flags='--runner pooling --hf-overrides \'{"architectures": ["MistralForSequenceClassification"], '
        f'"classifier_from_token": ["<unk>"], {_TRUE_LOGIT}}}\' {_TEMPLATE_FLAG}',
        note="As ctxl-rerank-v2, but a Mistral, whose token 0 is <unk>.",
    ),
    Family(
        name="nemotron-rerank",
        models=("nvidia/llama-nemotron-rerank-1b-v2",),
        card="https://huggingface.co/nvidia/llama-nemotron-rerank-1b-v2",
        method="head",
        architectures=("LlamaBidirectionalForSequenceClassification",),
        template="nemotron-rerank.jinja",
        max_length=8192,
        vllm_flags=f"--runner pooling --trust-remote-code {_TEMPLATE_FLAG}",
        note="Attends in both directions, with code of its own: locally trust_remote_code=True.",
    ),
    Family(
        name="nemotron-rerank-vl",
        models=("nvidia/llama-nemotron-rerank-vl-1b-v2",),
        card="https://huggingface.co/nvidia/llama-nemotron-rerank-vl-1b-v2",
        method="head",
        architectures=("LlamaNemotronVLForSequenceClassification",),
        template="nemotron-rerank.jinja",
        max_length=8192,
        local=False,
        vllm_flags=f"--runner pooling --trust-remote-code {_TEMPLATE_FLAG}",
        note="Text only: for images give vLLM its example template nemotron-vl-rerank.jinja, which puts <image> first. "
        "The model's own code removes a first <image> from text; this template leaves text as it is.",
    ),
    Family(
        name="jina-reranker-m0",
        models=("jinaai/jina-reranker-m0",),
        card="https://huggingface.co/jinaai/jina-reranker-m0",
        method="head",
        architectures=("JinaVLForRanking",),
        template="jina-reranker-m0.jinja",
        logit_bias=-2.65,
        max_length=10240,
        local=False,
        vllm_flags="--runner pooling",
        note="vLLM has this prompt built in, and the token with id 100 that must follow it.",
    ),
    Family(
        name="ms-marco",
        models=("cross-encoder/ms-marco-MiniLM-*", "cross-encoder/ms-marco-TinyBERT-*"),
        card="https://huggingface.co/cross-encoder/ms-marco-MiniLM-L6-v2",
        method="head",
        architectures=("BertForSequenceClassification",),
        max_length=512,
        note="The config names the activation: older revisions give logits, not 0 to 1.",
    ),
    Family(
        name="quora-roberta",
        models=("cross-encoder/quora-roberta-*",),
        card="https://huggingface.co/cross-encoder/quora-roberta-base",
        method="head",
        architectures=("RobertaForSequenceClassification",),
        max_length=512,
    ),
    Family(
        name="bge-reranker",
        models=("BAAI/bge-reranker-base", "BAAI/bge-reranker-large"),
        card="https://huggingface.co/BAAI/bge-reranker-large",
        method="head",
        architectures=("XLMRobertaForSequenceClassification",),
        max_length=512,
    ),
    Family(
        name="bge-reranker-v2-m3",
        models=("BAAI/bge-reranker-v2-m3",),
        card="https://huggingface.co/BAAI/bge-reranker-v2-m3",
        method="head",
        architectures=("XLMRobertaForSequenceClassification",),
        max_length=8192,
        note="Trained with 1,024 tokens, which its authors recommend as the limit.",
    ),
    Family(
        name="gte-reranker-modernbert",
        models=("Alibaba-NLP/gte-reranker-modernbert-base",),
        card="https://huggingface.co/Alibaba-NLP/gte-reranker-modernbert-base",
        method="head",
        architectures=("ModernBertForSequenceClassification",),
        max_length=8192,
    ),
    Family(
        name="gte-multilingual-reranker",
        models=("Alibaba-NLP/gte-multilingual-reranker-base",),
        card="https://huggingface.co/Alibaba-NLP/gte-multilingual-reranker-base",
        method="head",
        architectures=("NewForSequenceClassification", "GteNewForSequenceClassification"),
        max_length=8192,
        vllm_flags='--hf-overrides \'{"architectures": ["GteNewForSequenceClassification"]}\'',
        note="Has code of its own: locally trust_remote_code=True. vLLM has that code, under a less general name.",
    ),
    Family(
        name="sentence-transformers",
        models=(
            "sentence-transformers/all-MiniLM-*",
            "sentence-transformers/multi-qa-MiniLM-*",
            "sentence-transformers/paraphrase-MiniLM-*",
        ),
        card="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        method="bi-encoder",
        architectures=("BertModel",),
        vllm_flags="--runner pooling",
        note="So is scored every embedding model, here as on vLLM: cosine, -1 to 1. Prefixes such as E5's query: are "
        "the caller's to add.",
    ),
    Family(
        name="colbert",
        models=("colbert-ir/colbertv2.0", "answerdotai/answerai-colbert-small-v1"),
        card="https://huggingface.co/colbert-ir/colbertv2.0",
        method="late-interaction",
        architectures=("HF_ColBERT",),
        note="Scores grow with the query: compare them within a query only.",
    ),
    Family(
        name="colbert-modernbert",
        models=("lightonai/GTE-ModernColBERT-v1",),
        card="https://huggingface.co/lightonai/GTE-ModernColBERT-v1",
        method="late-interaction",
        vllm_flags='--hf-overrides \'{"architectures": ["ColBERTModernBertModel"]}\'',
    ),
    Family(
        name="jina-colbert-v2",
        models=("jinaai/jina-colbert-v2",),
        card="https://huggingface.co/jinaai/jina-colbert-v2",
        method="late-interaction",
        local=False,
        vllm_flags='--hf-overrides \'{"architectures": ["ColBERTJinaRobertaModel"]}\' --trust-remote-code',
    ),
    Family(
        name="lfm2-colbert",
        models=("LiquidAI/LFM2-ColBERT-350M",),
        card="https://huggingface.co/LiquidAI/LFM2-ColBERT-350M",
        method="late-interaction",
        local=False,
        vllm_flags='--hf-overrides \'{"architectures": ["ColBERTLfm2Model"]}\'',
    ),
)

_BY_NAME = {family.name: family for family in FAMILIES}


def find_family(model_name: str, architectures: Sequence[str] = ()) -> Family | None:
    """Find the family of a model by its name.

    Args:
        model_name: A hub id, or a folder that is called as the model is (a folder of the hub's cache, too).
        architectures: From its config.json. They tell a causal model from the classifier that was made of it, and a
            namesake from the model that is meant. Empty where not known yet.

    Returns:
        None for a model that is not in the table: similar names mean nothing.
    """
    name = _own_name(model_name)
    best, best_length = None, 0
    for family in FAMILIES:
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


def _own_name(model_name: str) -> str:
    """Strip a model's name of its owner and the folders above it, in lower case."""
    parts = [part for part in re.split(r"[/\\]", model_name) if part]
    for part in parts:
        if part.startswith("models--"):  # the hub's cache: models--OWNER--NAME/snapshots/REVISION
            return part.rpartition("--")[2].lower()
    return parts[-1].lower() if parts else ""
