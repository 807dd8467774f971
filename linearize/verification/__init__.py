"""Proof, on a checkpoint at hand, that a converted model is one function however it is called."""

from linearize.verification.verify import Check, Verification, verify, widened

__all__ = ["Check", "Verification", "verify", "widened"]
