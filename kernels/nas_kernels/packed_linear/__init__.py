"""Triton kernels shared by the linear maps whose weight is stored as integers with a row scale.

`triton_kernel.packed_linear` runs int8 weights (int8 or floating activations) and ternary ones,
four to a byte. It is imported only where a kernel is to run; the operations that are called are
`int8_linear`, `int8_weight_linear` and `ternary_linear`.
"""
