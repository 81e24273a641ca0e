"""Floor 5: looking into what was made: what runs took, and what it bought."""
