"""Does reranking help? A collection with judgments, a first stage to rerank, the usual measures, and what depth pays.

    from rag_rerank import LocalScorer
    from rag_rerank.evaluation import Collection, evaluate
    from rag_rerank.evaluation.report import render

    found = evaluate(Collection.load("scifact"), LocalScorer("BAAI/bge-reranker-v2-m3"), depths=(10, 50))
    found.systems[0].deepest.gains["nDCG@10"]     # Comparison(gain=..., low=..., high=..., wins=..., ...)
    Path("report.html").write_text(render(found))

Needs the extra `eval`: bm25s for BM25, ir-measures (on pytrec_eval) for the measures, matplotlib for plots.
"""

from rag_rerank.evaluation.collection import Collection, read_labelled
from rag_rerank.evaluation.measures import DEFAULT_MEASURES, Comparison, Run, compare
from rag_rerank.evaluation.results import Evaluation, Kept, Level, System
from rag_rerank.evaluation.retrieval import BM25
from rag_rerank.evaluation.running import DEFAULT_DEPTHS, evaluate
from rag_rerank.evaluation.scoring import Latency
from rag_rerank.evaluation.trec import read_judgments, read_run, write_run

__all__ = ["BM25", "Collection", "Comparison", "DEFAULT_DEPTHS", "DEFAULT_MEASURES", "Evaluation", "Kept", "Latency"]
__all__ += ["Level", "Run", "System", "compare", "evaluate", "read_judgments", "read_labelled", "read_run"]
__all__ += ["write_run"]
