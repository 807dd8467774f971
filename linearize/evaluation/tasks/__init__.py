"""Tasks that a model is scored on: lm-eval's, and our own suites."""
