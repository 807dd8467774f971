"""Evaluate a model beside its teacher: benchmark tasks (lm-eval), held-out rows of tokens, and a report of both."""
