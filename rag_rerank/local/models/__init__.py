"""The score types: from queries and documents to token sequences, and from their outputs to scores."""
