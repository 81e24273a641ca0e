"""What fits, how long a step takes and what a run costs, before it is started."""
