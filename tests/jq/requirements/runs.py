"""Runs on Llamas of well-known shapes."""

from jq.advise.known import find_model
from jq.models import Decoder, ModelConfig
from jq.models.hf_names import weight_table
from jq.presets import preset
from jq.recipe import uniform
from jq.requirements import Run, run_of


def llama(layers: int = 32) -> ModelConfig:
    """Llama-3-8B, or as deep as asked."""
    _, config = find_model("llama-3-8b")
    return config.with_changes(num_hidden_layers=layers, layer_windows=())


def run_on(config: ModelConfig, method: str = "gptq", tokens=(128, 2048), **knobs) -> Run:
    """A run with a preset."""
    model = Decoder(config)
    return run_of(
        model.block_names,
        model.linear_groups,
        {entry.path: entry.shape for entry in weight_table(config)},
        knobs.pop("recipe", uniform(*preset(method))),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        tokens=tokens,
        **knobs,
    )
