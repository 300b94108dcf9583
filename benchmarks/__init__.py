"""Measurements and fault tables; run from the checkout with ``python -m benchmarks``."""
