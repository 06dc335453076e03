"""Floor 3: from a request to a picture."""
