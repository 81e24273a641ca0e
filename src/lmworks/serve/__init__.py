"""Floor 4: models in and out: export with proof, fetch."""
