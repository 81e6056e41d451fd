"""Calibration and quantization shared by the devices of a mesh: the codes of one device, and no
exchanges but those that the formula knows.

The tests need eight devices, and run in a process of their own that has them.
"""

import dataclasses
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jq import tree
from jq.calib import CalibrationConfig, calibration_from_tokens, mesh_programs
from jq.calib.driver import TreeSource, quantize_blocks, quantize_model
from jq.communication import collectives, share
from jq.data_mesh import DataMesh, checked_mesh, columns_are_cut, data_mesh, shard_axis
from jq.errors import NonFiniteError, OutputError, SpecError
from jq.methods import cholesky
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ, factor_hessian
from jq.methods.rtn import RTN
from jq.methods.smoothquant import SmoothQuant
from jq.pipeline import quantize_checkpoint
from jq.recipe import Rule, uniform
from jq.requirements.arithmetic import arithmetic
from jq.requirements.memory import STATES, WEIGHTS, device_parts
from jq.requirements.workload import Block, Group, run_of
from jq.spec import QuantSpec, w8a8
from tests.calib import decoders, hlo, toy
from tests.devices import EIGHT, on_eight, run_with
from tests.models import checkpoints

pytestmark = pytest.mark.usefixtures("fast_compiles")
_BLOCK = {"model", "kind", "index", "devices", "specs"}
# The programs of a mesh, and their static arguments.
PROGRAMS = {
    "prepare": {"dtype", "devices", "specs"},
    "stage": _BLOCK,
    "zeros": {"k", "devices"},
    "finish": {"devices"},
    "factor": {"spec", "rounding", "devices"},
    "solve": {"spec", "rounding", "devices", "cut"},
    "choose": _BLOCK | {"method", "cuts", "rows"},
}
INT4 = QuantSpec("int4", 8)
SAMPLES, LENGTH = 27, 8  # three devices get four samples, five get three


@pytest.mark.skipif(EIGHT, reason="this is that process")
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(marked, tmp_path):
    run_with(8, __file__, marked, f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text")
    # Operations that are no program of ours, on arrays that lie in shards, exchange nothing.
    dumped = list(tmp_path.glob("*after_optimizations.txt"))
    talking = {f.name.split(".")[1] for f in dumped if hlo.collectives(f.read_text())}
    assert dumped
    assert talking <= {f"jit_{name}" for name in PROGRAMS}


def eight(axis: str = "data") -> Mesh:
    mesh = data_mesh("all", axis)
    assert mesh is not None
    return mesh


def masked() -> np.ndarray:
    mask = np.ones((SAMPLES, LENGTH), bool)
    mask[0, 5:] = mask[9, :3] = False
    return mask


def recorder(patch) -> hlo.Recorder:
    return hlo.Recorder(patch, mesh_programs, PROGRAMS)


def expected(model, params, recipe, tokens, hidden) -> hlo.Found:
    """What the formula says of all blocks."""
    run = run_of(
        model.block_names,
        model.linear_groups,
        {path: leaf.shape for path, leaf in tree.leaves(params)},
        recipe,
        hidden=hidden,
        heads=1,
        tokens=tokens.shape,
        compute_bytes=4,
    )
    ((block, count),) = run.blocks
    assert count == 2
    arrays = len(list(tree.leaves(params[model.block_names[0]])))
    found: hlo.Found = Counter()
    for last in (False, True):
        for one in collectives(run, block, 8, arrays=arrays, last=last):
            found[one.kind, one.bytes] += 1
    return found


def side_by_side(one, many):
    """Pairs of QTensors, on the default device."""
    others = decoders.qtensors(whole(many))
    return [(w, others[path]) for path, w in decoders.qtensors(one).items()]


def whole(params):
    """Parameters of a mesh, on the default device."""
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), params)


def different_codes(a, b) -> int:
    return int((np.asarray(a.unsigned_codes()) != np.asarray(b.unsigned_codes())).sum())


METHODS = {
    "gptq": (INT4, GPTQ(act_group_aware=True, true_sequential=False)),
    "awq": (INT4, AWQ(n_grid=5)),
    "smoothquant": (w8a8(), SmoothQuant("auto", smooth="all")),
    "static": (w8a8(activation="tensor", static=True), RTN()),
    "tensor": (QuantSpec("int8", granularity="tensor"), RTN()),
}


@on_eight
@pytest.mark.parametrize("name", METHODS)
def test_one_device_and_the_formula(name):
    """The codes of one device, and exchanges as `jq.communication` counts them."""
    model, params, tokens = toy.Toy(), toy.make_params(), toy.tokens(SAMPLES, LENGTH)
    recipe = uniform(*METHODS[name])
    masks = {} if name == "smoothquant" else {"mask": masked()}
    one, told = quantize_model(model, params, recipe, tokens, **masks)
    with pytest.MonkeyPatch.context() as patch:
        programs = recorder(patch)
        many, found = quantize_model(model, params, recipe, tokens, mesh=eight(), **masks)
    assert programs.found == expected(model, params, recipe, tokens, toy.WIDTH)
    pairs = side_by_side(one, many)
    differ = sum(different_codes(a, b) for a, b in pairs)
    # Sums in another order: a weight may be moved across the middle between two codes.
    assert sum(a.k * a.n for a, _ in pairs) == 2048
    assert differ <= (0 if name in ("static", "tensor") else 2)
    for a, b in pairs:
        np.testing.assert_allclose(np.asarray(a.scale), np.asarray(b.scale), rtol=1e-2)
    errors = [
        [
            (x.output_error or 0, x.rtn_output_error or 0, x.weight_error, x.tokens)
            for y in reports
            for x in y.linears
        ]
        for reports in (told, found)
    ]
    np.testing.assert_allclose(*map(np.array, errors), rtol=1e-3)


@on_eight
def test_large_hessians_are_factored_together(monkeypatch):
    """In blocks of four rows: as one device does, with the exchanges of the formula."""
    monkeypatch.setattr(cholesky, "SHARED_FROM", 16)
    monkeypatch.setattr(cholesky, "BLOCK", 4)
    for program in (mesh_programs.factor, factor_hessian):
        program.clear_cache()
    assert {k: cholesky.block_rows(k, 8) for k in (8, 16, 32)} == {8: None, 16: 4, 32: 4}
    test_one_device_and_the_formula("gptq")
    for program in (mesh_programs.factor, factor_hessian):
        program.clear_cache()


@on_eight
@pytest.mark.parametrize("name", ["gptq", "smoothquant"])
def test_offloading_and_batches_change_nothing(name):
    model, params = toy.Toy(), toy.make_params()
    recipe, tokens = uniform(*METHODS[name]), toy.tokens(SAMPLES, LENGTH)
    run = {"mesh": eight(), "mask": masked()} if name == "gptq" else {"mesh": eight()}
    at_once, _ = quantize_model(model, params, recipe, tokens, **run)
    parts, _ = quantize_model(model, params, recipe, tokens, offload=True, batch_size=2, **run)
    assert decoders.same(at_once, parts)


@on_eight
def test_fewer_samples_than_devices():
    model, params, tokens = toy.Toy(), toy.make_params(), toy.tokens(3, LENGTH)
    recipe = uniform(*METHODS["static"])
    one, _ = quantize_model(model, params, recipe, tokens)
    many, _ = quantize_model(model, params, recipe, tokens, mesh=eight())
    assert decoders.same(one, many)


@on_eight
def test_any_mesh_with_the_axis_will_do():
    """Explicit axes, other names, further axes; shards come out where the axis cuts."""
    model, params, tokens = toy.Toy(), toy.make_params(), toy.tokens(SAMPLES, LENGTH)
    recipe = uniform(*METHODS["static"])
    mesh = jax.make_mesh((2, 4), ("rest", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    out, _ = quantize_model(model, params, recipe, tokens, mesh=mesh, axis="fsdp", offload=True)
    expected, _ = quantize_model(model, params, recipe, tokens)
    assert decoders.same(out, expected)
    codes = out["first"]["up"]["kernel"].codes
    assert codes.addressable_shards[0].data.shape == (toy.WIDTH, toy.INNER // 4)
    with pytest.raises(SpecError, match="axes rest, fsdp, and none 'data'"):
        quantize_model(model, params, recipe, tokens, mesh=mesh)


@on_eight
@pytest.mark.parametrize("offload", [False, True])
def test_the_sample_that_is_not_finite_is_told(offload):
    model, tokens = toy.Toy(), toy.tokens(SAMPLES, LENGTH) % (toy.VOCAB - 1)
    params = toy.make_params()
    params["table"] = params["table"].at[toy.VOCAB - 1].set(np.inf)
    tokens[9, 4] = toy.VOCAB - 1
    with pytest.raises(NonFiniteError, match=r"calibration sample 9 \(1 of 27 samples\)"):
        quantize_model(model, params, uniform(INT4, GPTQ()), tokens, mesh=eight(), offload=offload)


@on_eight
@pytest.mark.slow
def test_a_decoder_exchanges_what_the_formula_says():
    """Some of its kernels are cut along K, and some not at all: eight zero points share bytes."""
    model, params, _, _ = decoders.make("llama3")
    tokens = decoders.tokens(9, LENGTH)
    rules = (
        Rule("mlp/", INT4, RTN()),
        Rule("k_proj", None),
        Rule("v_proj", QuantSpec("int4", 8, symmetric=False), RTN("output")),
        Rule(".*", w8a8("float8_e4m3fn"), RTN()),
    )
    with pytest.MonkeyPatch.context() as patch:
        programs = recorder(patch)
        quantize_model(model, params, rules, tokens, mesh=eight())
    hidden = model.config.hidden_size
    assert programs.found == expected(model, params, rules, tokens, hidden)


RAW = checkpoints.CONFIGS["qwen2"] | {"intermediate_size": 32, "num_hidden_layers": 2}
STATIC = uniform(w8a8(activation="tensor", static=True), RTN())


class Stop(Exception):
    pass


@on_eight
@pytest.mark.slow
def test_a_run_goes_on_with_as_many_devices(tmp_path):
    from jq.models.safetensors_file import write_safetensors

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RAW))
    write_safetensors(folder / "model.safetensors", checkpoints.random_weights(RAW))
    tokens = np.random.default_rng(0).integers(0, RAW["vocab_size"], (9, 16))
    config = CalibrationConfig("", 9, 16)
    calibration = calibration_from_tokens(tokens, config, vocab_size=RAW["vocab_size"])

    def stop(step):
        if step.done == 6:
            raise Stop

    def run(name, **options):
        quantize_checkpoint(folder, tmp_path / name, STATIC, calibration, **options)

    run("whole", mesh=eight())
    with pytest.raises(Stop):
        run("parts", mesh=eight(), progress=stop)
    for other, said in ((data_mesh(4), "4 devices"), (None, "1 device")):
        with pytest.raises(OutputError, match=f"mesh was '8 devices' and now is '{said}'"):
            run("parts", mesh=other)
    run("parts", mesh=eight())
    left, right = (
        {
            str(f.relative_to(tmp_path / n)): f.read_bytes()
            for f in (tmp_path / n).rglob("*")
            if f.is_file()
        }
        for n in ("whole", "parts")
    )
    assert left == right


@on_eight
def test_a_block_starts_from_what_an_earlier_run_left():
    model, params, tokens = toy.Toy(), toy.make_params(), toy.tokens(SAMPLES, LENGTH)
    source, recipe = TreeSource(params, model.block_names), uniform(*METHODS["static"])
    first, second = quantize_blocks(model, source, recipe, tokens, mesh=eight())
    left = np.asarray(first.hidden)
    assert left.shape == (32, LENGTH, toy.WIDTH)
    assert isinstance(first.hidden, jax.Array)
    for hidden, offload in ((left, False), (left, True), (first.hidden, False)):
        (again,) = quantize_blocks(
            model, source, recipe, tokens, mesh=eight(), done=1, hidden=hidden, offload=offload
        )
        assert decoders.same(again.params, second.params)


@on_eight
def test_samples_are_dealt_out():
    mesh = checked_mesh(eight(), "data")
    assert isinstance(mesh, DataMesh)
    for samples in (1, 7, 8, 9, 27):
        whole = np.arange(1, samples + 1)
        dealt = mesh.deal(whole)
        rows = dealt.reshape(8, -1)
        np.testing.assert_array_equal((rows > 0).sum(axis=1), mesh.counts(samples))
        assert mesh.counts(samples).sum() == samples
        assert np.ptp(mesh.counts(samples)) <= 1
        np.testing.assert_array_equal(mesh.undeal(dealt, samples), whole)
    assert list(mesh.deal(np.arange(1, 12))[:4]) == [1, 9, 2, 10]


def test_where_weights_are_cut():
    assert shard_axis((16, 32), 8) == 1
    assert shard_axis((16, 12), 8) == 0
    assert shard_axis((12, 12), 8) is None
    assert shard_axis((32,), 8) is None
    assert columns_are_cut(INT4, 64, 24, 8)
    assert not columns_are_cut(INT4, 64, 12, 8)
    assert not columns_are_cut(QuantSpec("int4", 8, symmetric=False), 64, 24, 8)
    assert columns_are_cut(QuantSpec("int4", 8, symmetric=False), 64, 64, 8)
    assert not columns_are_cut(QuantSpec("int8", granularity="tensor"), 64, 64, 8)


def test_too_few_devices_are_refused():
    count = len(jax.local_devices())
    with pytest.raises(SpecError, match=rf"{count + 1} devices are asked for.* has {count}"):
        data_mesh(count + 1)
    with pytest.raises(SpecError, match="0 devices"):
        data_mesh(0)
    assert data_mesh() is None  # on a CPU
    assert data_mesh(1) is None


def test_what_a_device_computes():
    """All but the factorisations of small Hessians is divided."""
    model, params, _, _ = decoders.make()
    recipe = (Rule(".*", INT4, GPTQ()),)
    run = run_of(
        model.block_names,
        model.linear_groups,
        {path: leaf.shape for path, leaf in tree.leaves(params)},
        recipe,
        hidden=32,
        heads=4,
        tokens=(16, 16),
    )
    block = run.blocks[0][0]
    eight_of_them = dataclasses.replace(run, devices=8)
    one, each = device_parts(run, block), device_parts(eight_of_them, block)
    assert each[WEIGHTS] == one[WEIGHTS] // 8
    assert one[STATES] / 8 <= each[STATES] < one[STATES] / 4  # perhaps of another moment
    whole, part = arithmetic(run, block), share(run, block, 8)
    factors = sum(group.k**3 / 3 for group in block.groups)
    assert part.products * 8 == pytest.approx(whole.products)
    assert part.wide_products == pytest.approx(factors + (whole.wide_products - factors) / 8)
    assert share(run, block, 1) == whole
    large = Block((Group(16384, (64,), recipe),))
    rest = arithmetic(run, large).wide_products - 16384**3 / 3
    products = share(run, large, 8).wide_products
    assert products == pytest.approx(rest / 8 + cholesky.products(16384, 8))
    assert products < 1.25 * (rest + 16384**3 / 3) / 8
