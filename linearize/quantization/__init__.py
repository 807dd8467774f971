"""Weights in int8 and int4."""
