"""Improve the energy of a trained classifier, or give the start back."""
