"""Floor 4: what can be trained. A task has modules and losses, and no loop of its own."""
