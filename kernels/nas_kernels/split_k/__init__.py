"""Splitting the sum over K between programs of a Triton kernel; imported only by kernels."""
