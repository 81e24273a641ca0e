"""Floor 1: what every other folder stands on, and nothing that needs torch."""
