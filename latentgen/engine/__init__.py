"""Floor 1: the one training loop and what it needs. accelerate's workings are known only here."""
