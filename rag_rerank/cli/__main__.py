"""``python -m rag_rerank.cli``."""

from rag_rerank.cli import main

main()
