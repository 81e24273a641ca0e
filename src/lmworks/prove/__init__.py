"""Floor 5: claims held against measurements: equal-budget comparisons, verdicts, evidence."""
