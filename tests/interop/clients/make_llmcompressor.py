"""compressed-tensors folders by llm-compressor's own quantization.

python make_llmcompressor.py MODEL TOKENS.npy OUT
"""

import torch
from _common import make_arguments
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def scheme(bits, symmetric, group_size=None, kind="int", activations=None):
    """The config group of a model whose linears are all alike."""
    strategy = "channel" if group_size is None else "group"
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
    }
    group = {"targets": ["Linear"], "weights": weights}
    if activations is not None:
        group["input_activations"] = {"num_bits": 8, "type": kind, "symmetric": True, **activations}
    return {"config_groups": {"group_0": group}}


RUNS = {
    "llmc-w4-sym": (QuantizationModifier, {"scheme": "W4A16"}),
    "llmc-w4-asym-gptq": (GPTQModifier, {"scheme": "W4A16_ASYM"}),
    "llmc-w4-sym-gptq": (GPTQModifier, {"scheme": "W4A16", "actorder": "static"}),
    "llmc-w3-asym": (QuantizationModifier, scheme(3, False, 128)),
    "llmc-w8-sym": (QuantizationModifier, {"scheme": "W8A16"}),
    "llmc-int8-dynamic": (QuantizationModifier, {"scheme": "W8A8"}),
    "llmc-int8-static": (
        QuantizationModifier,
        scheme(8, True, activations={"strategy": "tensor", "dynamic": False}),
    ),
    "llmc-fp8-dynamic": (QuantizationModifier, {"scheme": "FP8_DYNAMIC"}),
    "llmc-fp8-static": (QuantizationModifier, {"scheme": "FP8"}),
    "llmc-fp8-block": (QuantizationModifier, {"scheme": "FP8_BLOCK"}),
}


def main():
    source, tokens, out = make_arguments()
    tokenizer = AutoTokenizer.from_pretrained(source)
    for name, (modifier, options) in RUNS.items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        rows = [{"input_ids": row} for row in tokens]
        data = torch.utils.data.DataLoader(
            rows,
            collate_fn=lambda batch: {"input_ids": torch.stack([r["input_ids"] for r in batch])},
        )
        targets = {} if "config_groups" in options else {"targets": ["Linear"]}
        recipe = [modifier(ignore=["lm_head"], **targets, **options)]
        length = tokens.shape[1]
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(rows),
            max_seq_length=length,
            batch_size=1,
        )
        model.save_pretrained(out / name, save_compressed=True)
        tokenizer.save_pretrained(out / name)


if __name__ == "__main__":
    main()
