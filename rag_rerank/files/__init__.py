"""A file of queries in, a file of reranked queries out: streamed, resumable, and no line lost.

Beside the output OUT a run keeps ``OUT.partial``, the finished lines, and ``OUT.partial.json``, which says how far they
go and what they were made from. Both are brought to the disk after every group of lines, together; so a run that was
killed anywhere goes on behind the last group that it finished, and ends in the same bytes as if nothing had happened.
OUT itself appears when it is complete, and with it ``OUT.rejects.jsonl``, the lines that can't be reranked.
"""

from rag_rerank.files.partial import Tally, partial_of, rejects_of
from rag_rerank.files.run import rerank_file

__all__ = ["Tally", "partial_of", "rejects_of", "rerank_file"]
