"""Floor 6: one thin file per verb. Options in, library call, one line per mistake."""
