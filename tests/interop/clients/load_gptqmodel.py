"""Logits and dequantized weights of GPTQ and AWQ folders, by GPTQModel's torch kernels in float16.

python load_gptqmodel.py TOKENS.npy OUT FOLDER...
"""

import json

import torch
from _common import load_arguments, save, watched
from gptqmodel import BACKEND, GPTQModel


def main():
    tokens, out, folders = load_arguments()
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        awq = config["quant_method"] == "awq"
        backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
        model = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16)
        with torch.no_grad():
            logits = model.model(tokens).logits
            weights = {
                name: weight(module)
                for name, module in model.model.named_modules()
                if watched(name)
            }
        save(out, folder, logits, weights)


def weight(module):
    """[out, in] of a linear, by applying it to the unit vectors where it is packed."""
    if isinstance(module, torch.nn.Linear):
        return module.weight
    eye = torch.eye(module.in_features, dtype=torch.float16)
    return module(eye).T


if __name__ == "__main__":
    main()
