"""Floor 2: documents, tokenizers, token shards, and the deterministic loader."""
