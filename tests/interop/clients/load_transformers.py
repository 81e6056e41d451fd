"""Logits and dequantized weights of compressed-tensors folders, by transformers.

python load_transformers.py TOKENS.npy OUT FOLDER...
"""

import torch
from _common import load_arguments, save, watched
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig


def main():
    tokens, out, folders = load_arguments()
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=CompressedTensorsConfig(run_compressed=False),
            dtype=torch.float32,
        ).eval()
        with torch.no_grad():
            logits = model(tokens).logits
            plain = leave_activations(model) and model(tokens).logits
        weights = {name: m.weight for name, m in model.named_modules() if watched(name)}
        save(out, folder, logits, weights, plain)


def leave_activations(model):
    """Do not quantize activations from now on; returns whether any were."""
    schemes = [getattr(module, "quantization_scheme", None) for module in model.modules()]
    quantizing = [s for s in schemes if s is not None and s.input_activations is not None]
    for scheme in quantizing:
        scheme.input_activations = None
    return bool(quantizing) or None


if __name__ == "__main__":
    main()
