"""What fits, how long it takes and what it costs, before anything runs."""
