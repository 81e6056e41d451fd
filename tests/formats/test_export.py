"""Folders for other tools: complete, atomic, and read back bit for bit."""

import dataclasses
import json

import numpy as np
import pytest

from jq import tree
from jq.errors import CheckpointError, ModelError, OutputError, SpecError
from jq.formats.arrays import groups_of, packed_codes, unpack_codes, zeros_of
from jq.formats.export import ExportWriter
from jq.formats.plan import FormatOptions, plan_of, schemes_for
from jq.formats.reader import QuantizedCheckpoint
from jq.qtensor import QTensor
from jq.spec import FP8, ActivationSpec, QuantSpec, w8a8
from tests.formats import models
from tests.formats.models import W4, W4_SYM

OLD = FormatOptions(legacy_act_order=True)
BLOCK = QuantSpec(FP8, 16, True, "block", "float32", ActivationSpec(FP8, "group"))
FLOAT_SCALES = dataclasses.replace(W4, scale_dtype="float32")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Tied embeddings and biases, bfloat16."""
    return models.write_source(tmp_path_factory.mktemp("models") / "source")


def write(out, source, params, target, options=None, **more):
    schemes = schemes_for(plan_of(tree.leaves(params)), target, options)
    with ExportWriter(out, target, schemes, config_files_from=source, **more) as writer:
        for name, subtree in params.items():
            writer.write_part(name, subtree)
        writer.finish({"made by": "a test"})
    return out


def read(folder):
    return QuantizedCheckpoint(folder, place=models.on_host).load()


def weight(w):
    """[K, N], inputs in their own order, in float32."""
    stored = np.asarray(unpack_codes(packed_codes(w), w.spec.bits, w.k), np.float32)
    group = groups_of(np.arange(w.k) if w.order is None else w.order, w.k // w.scale.shape[0])
    return (stored - zeros_of(w)[group]) * w.scale[group].astype(np.float32)


def write_only(out, source, schemes, subtree):
    """A folder of which there is one layer."""
    with ExportWriter(out, "awq", schemes, config_files_from=source) as writer:
        writer.write_part("layers_0", subtree)
        writer.finish()


@pytest.mark.parametrize(
    ("target", "spec", "ordered", "options"),
    [
        ("gptq", W4, False, FormatOptions()),
        ("gptq", W4, False, FormatOptions("gptq")),
        ("gptq", W4_SYM, False, FormatOptions()),
        ("gptq", QuantSpec("int8", -1, True, scale_dtype="float16"), False, FormatOptions()),
        ("awq", W4, False, FormatOptions()),
        ("compressed-tensors", FLOAT_SCALES, False, FormatOptions()),
        ("compressed-tensors", QuantSpec("int3", 16), False, FormatOptions()),
        ("compressed-tensors", w8a8(activation="tensor", static=True), False, FormatOptions()),
        ("compressed-tensors", w8a8(FP8, weight="tensor"), False, FormatOptions()),
        ("compressed-tensors", BLOCK, False, FormatOptions()),
    ],
)
def test_what_was_written_is_read(tmp_path, source, target, spec, ordered, options):
    params = models.quantized(source, lambda path: None if "k_proj" in path else spec, ordered)
    out = write(tmp_path / "out", source, params, target, options, shard_bytes=3000)
    models.assert_same(read(out), params)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
def test_act_order_is_the_same_function(tmp_path, source, target):
    """Rows of a group may come back in another order; the weight may not change at all."""
    params = models.quantized(source, lambda path: W4, ordered=True)
    found = read(write(tmp_path / "out", source, params, target, OLD))
    for path, want in tree.leaves(params):
        if isinstance(want, QTensor):
            got = tree.get(found, path)
            assert got.order is not None
            np.testing.assert_array_equal(weight(got), weight(want))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_an_order_without_groups_is_undone(tmp_path, source, bits):
    spec = QuantSpec(f"int{bits}", -1, True)
    params = models.quantized(source, lambda path: spec, ordered=True)
    found = read(write(tmp_path / "out", source, params, "compressed-tensors"))
    for path, want in tree.leaves(params):
        if isinstance(want, QTensor):
            got = tree.get(found, path)
            assert got.order is None
            np.testing.assert_array_equal(weight(got), weight(want))


def test_the_folder_is_complete(tmp_path, source):
    params = models.quantized(source, lambda path: None if "layers_0/mlp" in path else W4_SYM)
    out = write(tmp_path / "out", source, params, "gptq")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "jaxq_export.json",
        "model.safetensors",
        "quantize_config.json",
        "tokenizer.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    for name, data in models.SMALL.items():
        assert (out / name).read_bytes() == data
    raw = json.loads((out / "config.json").read_text())
    quantization = raw.pop("quantization_config")
    assert raw == models.RAW
    assert quantization == json.loads((out / "quantize_config.json").read_text())
    assert len(quantization["dynamic"]) == 3
    manifest = json.loads((out / "jaxq_export.json").read_text())
    assert (manifest["format"], manifest["meta"]) == ("gptq", {"made by": "a test"})


def test_equal_parameters_give_equal_bytes(tmp_path, source):
    params = models.quantized(source, lambda path: W4)
    folders = [write(tmp_path / name, source, params, "awq") for name in ("a", "b")]
    first, second = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert first == second


def test_nothing_is_left_of_what_could_not_be_finished(tmp_path, source):
    params = models.quantized(source, lambda path: W4)
    schemes = schemes_for(plan_of(tree.leaves(params)), "awq")
    one = params["layers_0"]
    wrong_shape = tree.replace(one, "input_norm/scale", np.zeros(3, np.float32))
    plain = tree.replace(one, "mlp/up_proj/kernel", np.zeros((32, 48), np.float32))
    other = tree.replace(
        one,
        "mlp/up_proj/kernel",
        models.random_qtensor(np.random.default_rng(0), 32, 48, QuantSpec("int4", 32)),
    )
    for subtree, error, text in [
        (wrong_shape, CheckpointError, r"layers_0/input_norm/scale: shape \[3\], .* \[32\]"),
        (plain, CheckpointError, "layers_0/mlp/up_proj/kernel is not quantized, but"),
        (other, SpecError, "layers_0/mlp/up_proj/kernel"),
        ({"more": np.zeros(2)}, CheckpointError, "layers_0/more is none of the model's"),
        (one, CheckpointError, r"14 tensors are missing: embed/embedding, "),
    ]:
        with pytest.raises(error, match=text):
            write_only(tmp_path / "out", source, schemes, subtree)
        assert list(tmp_path.iterdir()) == []


def test_scales_that_do_not_fit_are_refused(tmp_path, source):
    params = models.quantized(source, lambda path: FLOAT_SCALES)
    with pytest.raises(SpecError, match=r"layers_0/\S+: the GPTQ file stores scales as float16"):
        write(tmp_path / "out", source, params, "gptq")
    assert list(tmp_path.iterdir()) == []
    options = FormatOptions(scale_dtype="float32")
    out = write(tmp_path / "out", source, params, "gptq", options)
    models.assert_same(read(out), params)


def test_overwriting(tmp_path, source):
    params = models.quantized(source, lambda path: W4)
    out = write(tmp_path / "out", source, params, "awq")
    with pytest.raises(OutputError, match="not empty"):
        write(out, source, params, "gptq")
    write(out, source, params, "gptq", overwrite=True)
    assert (out / "quantize_config.json").is_file()
    (tmp_path / ".out.partial-999999").mkdir()  # of a process that died
    write(out, source, params, "awq", overwrite=True)
    assert not (out / "quantize_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="something else than a jaxq checkpoint"):
        write(source, source, params, "awq", overwrite=True)


def test_a_writer_is_entered_and_finished(tmp_path, source):
    params = models.quantized(source, lambda path: W4)
    schemes = schemes_for(plan_of(tree.leaves(params)), "awq")
    writer = ExportWriter(tmp_path / "out", "awq", schemes, config_files_from=source)
    with pytest.raises(CheckpointError, match="was not entered"):
        writer.write_part("embed", params["embed"])
    with pytest.raises(CheckpointError, match="left without finish"), writer:
        pass
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        ExportWriter(tmp_path / "out", "awq", schemes, config_files_from=tmp_path)
