"""Floor 1: the one training loop and what it needs. accelerate is imported only here."""
