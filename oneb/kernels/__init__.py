"""Triton kernels and fused operations, each beside its plain-torch twin."""
