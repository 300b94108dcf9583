"""Measurements and fault tables; run from the checkout with ``python -m benchmarks``."""

import os

# Asking whether there is a GPU must not start CUDA here: the fault table forks afterwards.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
