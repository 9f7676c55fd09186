"""Slow, plain NumPy restatements of the papers, which the fast code must equal."""
