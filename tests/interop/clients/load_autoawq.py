"""Logits and dequantized weights of AWQ folders: AutoAWQ dequantizes, transformers runs.

python load_autoawq.py TOKENS.npy OUT FOLDER...
"""

import json
import warnings

import torch
from _common import load_arguments, save, watched
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

warnings.simplefilter("ignore")  # AutoAWQ says good-bye at each import

from awq.utils.packing_utils import dequantize_gemm  # noqa: E402


def main():
    tokens, out, folders = load_arguments()
    for folder in folders:
        raw = json.loads((folder / "config.json").read_text())
        config = AutoConfig.from_pretrained(folder)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        state = dequantized(folder, raw["quantization_config"])
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
        assert set(missing) <= {"lm_head.weight"}, missing  # tied
        model.tie_weights()
        with torch.no_grad():
            logits = model(tokens).logits
        weights = {name: m.weight for name, m in model.named_modules() if watched(name)}
        save(out, folder, logits, weights)


def dequantized(folder, config):
    """The state dict in float32."""
    packed = {}
    for file in sorted(folder.glob("*.safetensors")):
        packed |= load_file(file)
    state = {}
    for name, tensor in packed.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            size = config["group_size"] if config["group_size"] > 0 else tensor.shape[0]
            # float32 scales, so that only the format is compared and no rounding of products.
            state[f"{module}.weight"] = dequantize_gemm(
                tensor,
                packed[f"{module}.qzeros"],
                packed[f"{module}.scales"].float(),
                config["bits"],
                size,
            ).T.contiguous()
        elif suffix not in ("qzeros", "scales"):
            state[name] = tensor.float()
    return state


if __name__ == "__main__":
    main()
