"""Runs on Llamas of well-known shapes."""

from jq.models import Decoder, ModelConfig
from jq.models.hf_names import weight_table
from jq.presets import preset
from jq.recipe import uniform
from jq.requirements import Run, run_of


def llama(layers: int = 32, hidden: int = 4096, mlp: int = 14336, heads: int = 32) -> ModelConfig:
    """Llama-3-8B, or as deep and wide as asked."""
    return ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
    )


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
