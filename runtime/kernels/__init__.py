"""Kernels: each a folder with api.py, reference.py (the specification, on any device) and triton.py (CUDA)."""
