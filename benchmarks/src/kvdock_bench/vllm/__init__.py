"""vLLM as a baseline: a process in its own environment, asked over pipes; never imported here."""
