"""The formulas against the compiler's own accounts, against written weights, and in themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jq import statistics
from jq.blockwise import LinearGroup
from jq.group import round_group
from jq.methods.gptq import GPTQ, factor_hessian
from jq.methods.rtn import RTN
from jq.presets import default_recipe, preset
from jq.recipe import Rule
from jq.requirements import requirements, run_of
from jq.requirements.memory import HESSIAN, ROUNDING, STATES, _round_parts, quantized_bytes
from jq.requirements.workload import Block, Group
from jq.spec import QuantSpec
from tests.jq import problems
from tests.jq.requirements.runs import llama, run_on

WIDE = 4


def compiled_bytes(function, *arguments, held: int) -> int:
    """What a program has allocated at the end of its largest moment, and `held` of its inputs."""
    told = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return told.temp_size_in_bytes + told.output_size_in_bytes + held


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_rounding_takes_what_the_compiler_says(method):
    k, outputs = 512, (768, 768)
    spec, rounding = preset(method)
    weights = [jax.ShapeDtypeStruct((k, n), jnp.float32) for n in outputs]
    stats = jax.eval_shape(lambda: statistics.init(k)) if method == "gptq" else None

    def rounded(weights, stats):
        return round_group(weights, stats, spec, rounding)

    gram = k * k * WIDE * (method == "gptq")
    actual = compiled_bytes(rounded, weights, stats, held=gram)
    rule = Rule(".*", spec, rounding)
    parts = _round_parts(Group(k, outputs, (rule, rule)), sum(outputs), rule, 0)
    assert 0.95 < (parts[HESSIAN] + parts[ROUNDING]) / actual < 1.3


def test_factoring_takes_what_the_compiler_says():
    k = 512
    spec, rounding = preset("gptq")
    gram = jax.ShapeDtypeStruct((k, k), jnp.float32)
    actual = compiled_bytes(
        lambda gram: factor_hessian(gram, spec, rounding), gram, held=k * k * WIDE
    )
    run = run_on(llama())
    block = Block((Group(k, (1,), (Rule(".*", spec, rounding),)),))
    held = requirements(dataclasses.replace(run, blocks=((block, 1),), outer=0, samples=0))
    assert 0.95 < held.device_parts[HESSIAN] / actual < 1.1


@pytest.mark.parametrize(
    ("spec", "rounding"),
    [
        (QuantSpec("int4", 32, symmetric=False), RTN()),
        (QuantSpec("int3", 64), RTN()),
        (QuantSpec("int8", -1, scale_dtype="float32"), RTN()),
        (QuantSpec("int4", 32), GPTQ(desc_act=True)),
    ],
)
def test_a_finished_block_is_as_large_as_its_arrays(spec, rounding):
    k, n = 128, 64
    rule = Rule(".*", spec, rounding)
    block = Block((Group(k, (n, n), (rule, None)),), others=10)
    stats = statistics.finish(
        statistics.update(statistics.init(k), jnp.asarray(problems.inputs(k, 256)))
    )
    made = round_group([jnp.asarray(problems.weights(k, n))], stats, spec, rounding)
    assert quantized_bytes(block, 2) == made.qtensors[0].nbytes + 2 * (k * n + 10)


def test_depth_costs_disk_and_time_but_no_memory():
    shallow, deep = (requirements(run_on(llama(layers))) for layers in (2, 80))
    assert (shallow.device, shallow.host) == (deep.device, deep.host)
    assert deep.arithmetic == shallow.arithmetic.times(40)
    one = run_on(llama(1))
    block = quantized_bytes(one.blocks[0][0], 2)
    assert deep.output - shallow.output == deep.disk - shallow.disk == 78 * block
    # 4.15625 bits per weight, and two norms in 16 bits
    assert block == pytest.approx(218_103_808 * 4.15625 / 8 + 2 * 2 * 4096, rel=1e-9)


def test_offloading_moves_the_hidden_states():
    here = requirements(run_on(llama()))
    there = requirements(run_on(llama(), offload=True))
    states = 128 * 2048 * (4 * 4096 + 14336) * 2  # at the MLP: block input, its input, its output
    assert here.device_parts[STATES] == there.host_parts[STATES] == states
    assert STATES not in here.host_parts
    # Its input stays, and that of q, k, v; then down's Hessian is the largest thing there is.
    assert there.device < here.device / 3
    batches = [requirements(run_on(llama(), offload=True, batch_size=b)) for b in (1, 64)]
    assert batches[0].device < batches[1].device


def test_kinds_of_blocks_are_counted():
    recipe = (Rule("layers_0/", None, None), *default_recipe())
    run = run_on(llama(4), recipe=recipe)
    assert [count for _, count in run.blocks] == [1, 3]
    mixed, plain = requirements(run), requirements(run_on(llama(4)))
    assert mixed.device == plain.device
    assert mixed.output > plain.output


def test_what_no_calibration_needs():
    nearest = requirements(run_on(llama(), "rtn", tokens=None))
    assert STATES not in nearest.device_parts
    assert nearest.arithmetic.products == nearest.arithmetic.wide_products == 0
    assert nearest.disk == nearest.output
    exported = requirements(run_on(llama(), "rtn", tokens=None, copies=2))
    assert exported.disk == 2 * exported.output - llama_outer_bytes()


def llama_outer_bytes() -> int:
    return 2 * (2 * 128256 * 4096 + 4096)


def test_known_counts_of_operations():
    """Llama-3-8B, 128 x 2048 tokens, by hand."""
    run = run_on(llama(1))
    found = requirements(run).arithmetic
    tokens, k, mlp = 128 * 2048, 4096, 14336
    forward = 2 * (218_103_808 + 2 * 4096) * tokens + 4 * 2048 * k * tokens
    grams = 2 * 0.625 * tokens * (3 * k**2 + mlp**2)
    assert found.products == pytest.approx(forward + grams, rel=1e-12)
    kn = [(k, 6144), (k, 4096), (k, 2 * mlp), (mlp, k)]
    # Pulls in panels of 1024 rows, half of them; three errors with 5/8 of the Gram matrix each.
    solve = sum((k + 1024 + 3.75 * k) * k * n for k, n in kn) + (3 * k**3 + mlp**3) / 3
    assert found.wide_products == pytest.approx(solve, rel=1e-12)


@pytest.mark.slow
def test_a_process_holds_what_was_foretold():
    """Peak resident memory of a whole run on the CPU, where host and device are one."""
    from jq.requirements.machine import PROCESS_BYTES
    from scripts.bench_memory import Bench, measure

    bench = Bench(hidden=512, samples=64, seq_len=256)
    actual = measure(bench, 2).peak_bytes - PROCESS_BYTES
    run = run_on(bench.config(2), tokens=(bench.samples, bench.seq_len), compute_bytes=4)
    assert 0.8 < requirements(run).shared / actual < 1.4


def test_a_run_is_read_off_a_model_of_any_kind():
    shapes = {"layers_0/a/kernel": (4, 8), "layers_0/b/kernel": (4, 16), "x": (3, 5)}
    groups = (LinearGroup("ab", ("a", "b")),)
    recipe = default_recipe(group_size=4)
    run = run_of(("layers_0",), groups, shapes, recipe, hidden=4, heads=1)
    ((block, count),) = run.blocks
    assert (block.parameters, count, run.outer) == (96, 1, 15)
    assert block.groups[0].sides == {recipe[0]: 24}  # rounded side by side
