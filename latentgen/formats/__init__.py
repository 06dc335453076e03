"""Files that other tools read and write: the model folder and its kin."""
