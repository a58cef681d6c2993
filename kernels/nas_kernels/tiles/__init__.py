"""What the device code of several operations shares; imported only by kernels."""
