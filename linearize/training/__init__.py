"""Recovering what the swap cost: training data, objectives, and the loop that runs them."""
