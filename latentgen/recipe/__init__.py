"""Floor 5: the typed recipe, and the one place that builds everything from it."""
