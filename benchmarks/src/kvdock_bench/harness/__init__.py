"""The bridge to lm-eval: its tasks, answered with a compressed cache."""
