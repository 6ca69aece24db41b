"""vLLM's import structure around what this package replaces, and nothing else: every function says whose it is."""
