"""A file of queries in, a file of reranked queries out: streamed, resumable, and no line lost.

Beside the output OUT a run keeps ``OUT.partial``, a sqlite file (with its log, ``OUT.partial-wal``) of the finished
lines, how far they go, and what and who they were made from. It is brought to the disk after every group of lines, so a
run that was killed anywhere continues behind the last group that it finished, and ends in the same bytes as if nothing
had happened. OUT itself appears when it is complete, and with it ``OUT.rejects.jsonl``, the lines that can't be
reranked.

Nothing but the same scorer continues a run: other weights, another model behind the same URL, another option or
input are refused, also in the middle of a run. Not noticed: a server that is replaced and put back within one
group of 256 documents, and one of several servers behind a load balancer while none of the probes reaches it.
"""

from rag_rerank.files.partial import Tally, partial_of, rejects_of
from rag_rerank.files.run import rerank_file

__all__ = ["Tally", "partial_of", "rejects_of", "rerank_file"]
