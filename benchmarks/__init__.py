"""Benchmarks: ``python -m benchmarks.unet``, ``python -m benchmarks.kernels``, ``python -m benchmarks.quality``."""
