"""Samplers of a classifier's energy: chains in pixel space, and what they leave behind."""
