"""Inputs that lie: mutations, the parsers that take them, and the bounds that these keep."""
