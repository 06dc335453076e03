"""The networks: builders and thin wrappers round diffusers, transformers and open_clip modules."""
