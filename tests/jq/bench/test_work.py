"""What a step computes and moves, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.bench import Ceilings, Work, decode_work, linear_work, prefill_work, roofline
from jq.errors import SpecError
from jq.models import Decoder, ModelConfig
from jq.oneshot import quantize
from jq.presets import preset
from jq.recipe import uniform

CEILINGS = Ceilings(80.0, 100.0, {"float32": 1000.0, "int8": 4000.0})


def test_the_longer_of_moving_and_computing_bounds():
    line = roofline(Work({"float32": 500.0}, 100.0), CEILINGS)
    assert (line.memory_seconds, line.compute_seconds) == (1.0, 0.5)
    assert (line.intensity, line.balance, line.bound) == (5.0, 10.0, "memory")
    assert line.fraction(2.0) == 0.5
    told = line.to_dict(2.0)
    assert (told["ceiling_seconds"], told["fraction_of_ceiling"]) == (1.0, 0.5)
    line = roofline(Work({"float32": 2000.0, "int8": 8000.0}, 100.0), CEILINGS)
    assert (line.compute_seconds, line.bound, line.seconds) == (4.0, "compute", 4.0)
    assert line.balance == 25.0  # these operations together run at 2500 per second
    assert (line.intensity > line.balance) == (line.bound == "compute")
    with pytest.raises(SpecError, match="no rate of bfloat16 products was measured, only of float"):
        roofline(Work({"bfloat16": 1.0}, 1.0), CEILINGS)


def quantized(name, **options):
    params = {"linear": {"kernel": np.ones((64, 32), np.float32)}}
    return quantize(params, uniform(*preset(name, **options)))["linear"]["kernel"]


def test_work_of_a_linear():
    plain = linear_work(jnp.zeros((64, 32), jnp.bfloat16), 3, jnp.float32)
    assert plain == Work({"float32": 2.0 * 3 * 64 * 32}, 64 * 32 * 2 + 3 * (64 + 32) * 4)
    int4 = linear_work(quantized("rtn", group_size=32), 1, jnp.bfloat16)
    codes, scales, zeros = 64 * 32 // 2, 2 * 32 * 2, 2 * 32 // 2
    assert int4 == Work({"bfloat16": 2.0 * 64 * 32}, codes + scales + zeros + (64 + 32) * 2)
    int8 = linear_work(quantized("int8"), 1, jnp.bfloat16)
    assert int8 == Work({"int8": 2.0 * 64 * 32}, 64 * 32 + 4 * 32 + (64 + 32) * 2)


RAW = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("tied", [False, True])
def test_work_of_a_decode_step(tied):
    config = ModelConfig.from_hf(RAW | {"tie_word_embeddings": tied})
    model = Decoder(config)
    params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    work = decode_work(model, params, batch_size=3, cache_tokens=10)
    linear = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 16 * 24 * 3)
    norms = 2 * 2 * 16 + 16
    # Scores and their sum over values: two products per head, slot and channel.
    attention = 2 * 2 * 3 * 10 * 2 * 4 * 4
    assert work.operations == {"float32": 2 * 3 * (linear + 40 * 16) + attention}
    cache = 2 * 2 * 3 * 10 * 2 * 4
    assert work.nbytes == 4 * (linear + norms + 40 * 16 + cache)
    prompt = prefill_work(model, params, batch_size=3, tokens=7, cache_tokens=10)
    # All tokens go through the blocks, and one of each sequence through the head.
    assert prompt.operations == {"float32": 7 * (2 * 3 * linear + attention) + 2 * 3 * 40 * 16}
    assert prompt.nbytes == work.nbytes
