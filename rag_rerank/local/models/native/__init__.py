"""Models whose repositories bring code of their own: run by transformers' code, or by ours, never by theirs."""
