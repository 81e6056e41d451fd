"""An AWQ folder with AutoAWQ's own grid and packing (without its search for scales).

python make_autoawq.py MODEL TOKENS.npy OUT
"""

import json
import shutil
import warnings

import torch
from _common import make_arguments
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")

from awq.models._config import AwqConfig  # noqa: E402
from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402
from awq.quantize.quantizer import AwqQuantizer  # noqa: E402

GROUP_SIZE = 64


def main():
    source, _, out = make_arguments()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    quantizer = AwqQuantizer.__new__(AwqQuantizer)  # its constructor wants a model it knows
    quantizer.w_bit, quantizer.group_size, quantizer.zero_point = 4, GROUP_SIZE, True
    state = {}
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    for name, linear in linears.items():
        linear.weight.data, scales, zeros = quantizer.pseudo_quantize_tensor(linear.weight.data)
        packed = WQLinear_GEMM.from_linear(
            linear, 4, GROUP_SIZE, False, scales.t().contiguous(), zeros.t().contiguous()
        )
        state |= {f"{name}.{key}": value.contiguous() for key, value in packed.state_dict().items()}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in linears and name not in tied:
            state[name] = tensor.contiguous()
    folder = out / "autoawq-w4-asym-g64"
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = AwqConfig(q_group_size=GROUP_SIZE).to_transformers_dict()
    raw = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    for file in source.glob("tokenizer*.json"):
        shutil.copy(file, folder)


if __name__ == "__main__":
    main()
