"""Everything between a quantized product and `jq.pallas_kernels`.

choice: which kernel, and why.  operations: a kernel on CUDA, XLA elsewhere.  convert: weights in a
kernel's layout.  activations, products: what `jq.matmul.qmatmul` calls.
"""
