"""Check on a checkpoint that a converted model computes the same function in every way of calling it."""

from linearize.verification.verify import Check, Verification, verify, widened

__all__ = ["Check", "Verification", "verify", "widened"]
