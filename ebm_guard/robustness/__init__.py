"""Robustness of a classifier and of its gate: attacks, corruptions, and what they do not show."""
