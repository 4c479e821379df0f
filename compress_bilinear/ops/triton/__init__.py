"""Fused kernels for NVIDIA GPUs, and the operators that launch them; Triton itself is imported lazily."""
