"""Floor 0: errors, seeded randomness, atomic files, logging, the run folder. torch and the standard library only."""
