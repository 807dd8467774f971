"""How good a model is beside its teacher: benchmark tasks (lm-eval), held-out rows of tokens, the report of both."""
