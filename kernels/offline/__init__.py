"""Compiling the Triton kernels for GPUs that are not there, and judging what comes out."""
