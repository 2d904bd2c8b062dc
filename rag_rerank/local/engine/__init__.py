"""One thread for each loaded model, which callers share."""
