"""From token sequences to hidden states."""
