"""Floor 2: the one way to fan work out, over local processes, Slurm arrays or Ray."""
