"""Floor 5: which share of each source to train on. Small runs, what is learnt from them, and the search."""
