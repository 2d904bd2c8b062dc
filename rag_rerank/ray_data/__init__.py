"""Offline scoring beyond one process and one machine: Ray's pools of actors, each with a scorer of its own.

    rerank_folder(LocalScorer("BAAI/bge-reranker-v2-m3"), Path("pairs/"), Path("scored/"), pool=Pool(actors=8))

    pairs = ray.data.read_parquet("s3://bucket/pairs")       # columns query, document
    score_dataset(pairs, LocalScorer("BAAI/bge-reranker-v2-m3"), pool=Pool(actors=8)).write_parquet("s3://bucket/scored")

`rerank_folder` is what ``rag-rerank rerank --engine ray`` runs: files to files; it continues where it was interrupted.
`score_dataset` is a step between others of a pipeline in Ray Data. Needs the extra `ray`; Ray is imported by the first
call. On a cluster (``RAY_ADDRESS``), the package is installed on every node.
"""

from rag_rerank.ray_data.batches import score_dataset
from rag_rerank.ray_data.pool import Pool
from rag_rerank.ray_data.run import rejects_in, rerank_folder

__all__ = ["Pool", "rejects_in", "rerank_folder", "score_dataset"]
