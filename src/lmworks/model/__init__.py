"""Floor 2: the networks. Tensors in, tensors out; no parallel line, no tokenizer, no training."""
