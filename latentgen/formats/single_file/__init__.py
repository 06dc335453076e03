"""Models in one file, in the layout of the original programs: `read` and `write`."""
