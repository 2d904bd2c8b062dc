"""``python -m rag_rerank``."""

from rag_rerank.cli import main

main()
