"""Kernels for compute capability 8.0, 8.6 and 8.9 (Ampere and Ada): `mma.sync` and `cp.async`.

The weights are packed as for Hopper; only the instructions that read them differ.
"""
