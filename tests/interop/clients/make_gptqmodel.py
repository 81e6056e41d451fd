"""GPTQ folders by GPTQModel's own quantization.

python make_gptqmodel.py MODEL TOKENS.npy OUT
"""

import torch
from _common import make_arguments
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

COMMON = {"device": "cpu", "offload_to_disk": False, "group_size": 128}
RUNS = {
    "gptqmodel-w4-sym-v1": {"bits": 4, "sym": True, "desc_act": False},
    "gptqmodel-w4-asym-v1": {"bits": 4, "sym": False, "desc_act": False, "group_size": 32},
    "gptqmodel-w4-asym-v2": {"bits": 4, "sym": False, "desc_act": False, "format": "gptq_v2"},
    "gptqmodel-w4-sym-act-order": {
        "bits": 4,
        "sym": True,
        "desc_act": True,
        "act_group_aware": False,
    },
    "gptqmodel-w3-sym": {"bits": 3, "sym": True, "desc_act": False},
    "gptqmodel-w8-column": {
        "bits": 8,
        "sym": True,
        "desc_act": False,
        "act_group_aware": False,
        "group_size": -1,
    },
    "gptqmodel-mixed": {
        "bits": 4,
        "sym": True,
        "desc_act": False,
        "dynamic": {
            r"-:model\.layers\.0\.mlp\.down_proj": {},
            r"+:.*\.o_proj": {"bits": 8, "group_size": 64},
        },
    },
}


def main():
    source, tokens, out = make_arguments()
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    for name, options in RUNS.items():
        config = QuantizeConfig(**(COMMON | options))
        model = GPTQModel.load(str(source), config, backend=BACKEND.GPTQ_TORCH, dtype=torch.float32)
        model.quantize(
            rows, batch_size=1, backend=BACKEND.GPTQ_TORCH, calibration_data_min_length=1
        )
        model.save(str(out / name))


if __name__ == "__main__":
    main()
