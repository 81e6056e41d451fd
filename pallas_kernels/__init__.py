"""Matrix products with quantized weights: plain arrays in, plain arrays out.

`reference` holds the XLA version of every product; it runs everywhere and defines what is right.
"""

if __name__ != "jq.pallas_kernels":
    raise ImportError("import this package as jq.pallas_kernels, not by its folder's name")
