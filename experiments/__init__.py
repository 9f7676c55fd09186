"""Studies, benchmarks and the quickstart: one command each, run as ``python -m experiments.X``."""
