"""Landmarks: exact keys and values beside window and sinks. Read `slots.py` first."""
