"""The mixer of a converted layer: window, sinks, landmarks, recurrence and mix. Read `mixer.py` first."""
