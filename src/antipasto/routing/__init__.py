"""Extract a hack direction from labelled pairs, score completions with it (monitor), and split optimizer steps (router)."""
