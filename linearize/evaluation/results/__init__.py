"""Figures of evaluations: pairing, comparison, reports."""
