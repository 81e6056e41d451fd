"""jq: quantization of large language models in JAX."""
