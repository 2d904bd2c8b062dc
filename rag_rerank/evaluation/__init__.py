"""Does reranking help? A collection with judgments, a first stage to rerank, the usual measures, and what depth pays.

    from rag_rerank import LocalScorer
    from rag_rerank.evaluation import Collection, evaluate
    from rag_rerank.evaluation.report import render

    found = evaluate(Collection.load("scifact"), LocalScorer("BAAI/bge-reranker-v2-m3"), depths=(10, 50))
    found.systems[0].deepest.gains["nDCG@10"]     # Comparison(gain=..., low=..., high=..., wins=..., ...)
    Path("report.html").write_text(render(found))

Needs the extra `eval`: bm25s for BM25, ir-measures (on pytrec_eval) for the measures, matplotlib for plots.
"""

from rag_rerank.evaluation.collection import Collection as Collection
from rag_rerank.evaluation.measures import DEFAULT_MEASURES as DEFAULT_MEASURES
from rag_rerank.evaluation.measures import Run as Run
from rag_rerank.evaluation.measures import measure as measure
from rag_rerank.evaluation.results import Evaluation as Evaluation
from rag_rerank.evaluation.results import Level as Level
from rag_rerank.evaluation.results import System as System
from rag_rerank.evaluation.retrieval import BM25 as BM25
from rag_rerank.evaluation.running import DEFAULT_DEPTHS as DEFAULT_DEPTHS
from rag_rerank.evaluation.running import evaluate as evaluate
from rag_rerank.evaluation.scoring import Latency as Latency
from rag_rerank.evaluation.significance import Comparison as Comparison
from rag_rerank.evaluation.significance import compare as compare
from rag_rerank.evaluation.trec import read_judgments as read_judgments
from rag_rerank.evaluation.trec import read_run as read_run
from rag_rerank.evaluation.trec import write_run as write_run
