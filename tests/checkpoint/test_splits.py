"""Large arrays lie in pieces along the axis that devices share, and damage is named."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.checkpoint import load_params, orbax_io, read_manifest, splits
from jq.checkpoint.part_writer import save_part
from jq.cuts import CutRule
from jq.errors import CheckpointError
from jq.methods.rtn import RTN
from jq.models import Decoder
from jq.models.config import ModelConfig
from jq.models.safetensors_file import write_safetensors
from jq.pipeline import quantize_checkpoint
from jq.recipe import uniform
from jq.spec import QuantSpec, w4a16, w8a8
from tests.checkpoint.trees import SPECS, assert_same, digests, quantized, small_tree, write
from tests.models import checkpoints

MODEL = Decoder(ModelConfig.from_hf(checkpoints.CONFIGS["llama3"]))
RULE = CutRule(MODEL)
UP, DOWN = (f"layers_0/mlp/{name}_proj/kernel" for name in ("up", "down"))
ZERO = w4a16(16, symmetric=False)
WIDE = np.arange(512, dtype=np.int16).reshape(16, 32)


@pytest.fixture
def everything(monkeypatch):
    """Arrays of any size are stored in pieces."""
    monkeypatch.setattr(splits, "MIN_BYTES", 1)


def shapes(spec, k, n, **options):
    return jax.eval_shape(lambda: quantized(spec, k, n, **options))


@pytest.mark.parametrize(
    ("path", "spec", "k", "n", "ordered", "found"),
    [
        (UP, w4a16(16), 64, 32, False, {"codes": (1, 8), "scale": (1, 8)}),
        (DOWN, w4a16(16), 256, 32, False, {"codes": (0, 8), "scale": (0, 8)}),
        (DOWN, w4a16(16), 64, 32, False, {"codes": (0, 4), "scale": (0, 4)}),  # whole groups
        (DOWN, w4a16(16), 96, 32, False, {"codes": (0, 2), "scale": (0, 2)}),
        (DOWN, w4a16(16), 48, 32, False, {}),
        (DOWN, w4a16(16), 48, 32, True, {"codes": (1, 8), "scale": (1, 8)}),  # rows lie anywhere
        (DOWN, QuantSpec("int3", -1), 64, 32, False, {"codes": (0, 8)}),  # a scale for all of K
        (DOWN, w8a8(), 64, 32, False, {"codes": (1, 8), "scale": (1, 8)}),
        (UP, ZERO, 16, 64, False, dict.fromkeys(("codes", "scale", "zero_point"), (1, 8))),
        # Eight zero points share bytes.
        (UP, ZERO, 16, 32, False, dict.fromkeys(("codes", "scale", "zero_point"), (1, 4))),
        ("head/kernel", w4a16(16), 64, 20, False, {"codes": (1, 4), "scale": (1, 4)}),
        (UP, w4a16(16), 64, 33, False, {}),
    ],
)
def test_pieces_of_quantized_weights(path, spec, k, n, ordered, found):
    w = shapes(spec, k, n, ordered=ordered)
    assert splits.plan(path, w, RULE) == {f"{path}/{name}": at for name, at in found.items()}


def test_pieces_of_other_arrays():
    cases = {
        ("embed/embedding", (64, 24)): (0, 8),
        ("lm_head/kernel", (24, 36)): (1, 4),
        (UP, (64, 24)): (1, 8),
        (DOWN, (64, 24)): (0, 8),
        ("layers_0/input_norm/scale", (64,)): None,
        ("moe/experts/up", (8, 3, 18)): (2, 2),  # unknown to the rule
        ("moe/experts/up", (8, 4, 3)): None,
    }
    for (path, shape), found in cases.items():
        planned = splits.plan(path, jax.ShapeDtypeStruct(shape, jnp.bfloat16), RULE)
        assert planned == ({} if found is None else {path: found})
    # Without a model it is always the last axis.
    table = np.ones((24, 64))
    assert splits.plan("embed/embedding", table, CutRule()) == {"embed/embedding": (1, 8)}
    experts = shapes(w4a16(16), 32, 16, lead=(4,))
    found = {f"moe/up/{name}": (2, 8) for name in ("codes", "scale")}
    assert splits.plan("moe/up", experts, RULE) == found


def test_small_arrays_stay_whole(tmp_path):
    large, small = np.ones((2, 1 << 16), np.int32), np.ones((2, (1 << 16) - 2), np.int32)
    path = write(tmp_path / "q", {"a": {"large": large, "small": small}})
    tensors = read_manifest(path).parts["a"].tensors
    assert tensors["a/large"].chunk_shape == (2, 1 << 13)
    assert tensors["a/small"].chunks == ()
    np.testing.assert_array_equal(load_params(path)["a"]["large"], large)


@pytest.mark.usefixtures("everything")
def test_every_kind_of_weight(tmp_path):
    params = {name: {"kernel": quantized(spec, 64, 64)} for name, spec in SPECS.items()}
    experts = {"up": quantized(SPECS["int4_zeros"], 16, 64, lead=(3,), ordered=True)}
    plain = {"wide": jnp.asarray(WIDE.T).T, "bf16": jnp.ones((2, 3, 16), jnp.bfloat16)}
    params |= {"layers_0": small_tree()["layers_0"], "experts": experts, "plain": plain}
    first, second = (write(tmp_path / name, params, cuts=RULE) for name in ("a", "b"))
    assert_same(load_params(first), params)
    assert digests(first) == digests(second)
    manifest = read_manifest(first)
    assert manifest.format_version == 3
    cut = 0
    for name, part in manifest.parts.items():
        for path, entry in part.arrays():
            folder = first / "params" / name / "state" / path.replace("/", ".")
            files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
            if entry.split is None:
                assert len(files) == 1
                continue
            cut += 1
            assert entry.grid[entry.split] == len(entry.chunks) == len(files) >= 2
            # `sha256sum` of a file is its digest in the manifest.
            assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == list(
                entry.chunks
            )
    assert cut > 20


@pytest.mark.usefixtures("everything")
def test_a_part_that_was_linked_is_the_same(tmp_path):
    w = {"mlp": {"down_proj": {"kernel": quantized(w4a16(8), 64, 16)}}}
    part = save_part(tmp_path / "part", "layers_0", w, cuts=RULE)
    assert part.tensors[DOWN].fields["codes"].chunk_shape == (4, 16)
    path = write(tmp_path / "q", {"layers_0": w}, cuts=RULE)
    assert digests(path / "params/layers_0") == digests(tmp_path / "part")
    assert read_manifest(path).parts["layers_0"] == part


class PowerCut(Exception):
    pass


@pytest.mark.usefixtures("everything")
def test_a_stopped_run_goes_on_to_the_same_pieces(tmp_path):
    raw = checkpoints.CONFIGS["qwen2"] | {"intermediate_size": 64, "num_hidden_layers": 2}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(raw))
    write_safetensors(tmp_path / "model/model.safetensors", checkpoints.random_weights(raw))

    def stop(step):
        if step.done == 6:
            raise PowerCut

    recipe = uniform(QuantSpec("int4", 8), RTN())
    quantize_checkpoint(tmp_path / "model", tmp_path / "whole", recipe)
    with pytest.raises(PowerCut):
        quantize_checkpoint(tmp_path / "model", tmp_path / "q", recipe, progress=stop)
    assert quantize_checkpoint(tmp_path / "model", tmp_path / "q", recipe).resumed == 1
    assert digests(tmp_path / "q") == digests(tmp_path / "whole")
    tensors = read_manifest(tmp_path / "q").parts["layers_0"].tensors
    assert tensors[UP].fields["codes"].split == 1
    assert tensors[DOWN].fields["codes"].split == 0


def test_checkpoints_of_before_are_read(tmp_path):
    """Version 1, whole arrays; `cut_into_chunks` of other tests makes those of version 2."""
    large = {"a": {"w": np.ones((2, 1 << 16), np.int32)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "MIN_BYTES", 1 << 40)
        path = write(tmp_path / "q", large)
    assert read_manifest(path).format_version == 1
    assert '"split"' not in (path / "jaxq.json").read_text()
    np.testing.assert_array_equal(load_params(path)["a"]["w"], large["a"]["w"])


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """To be copied: `WIDE` in eight pieces of four columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "MIN_BYTES", 1)
        return write(tmp_path_factory.mktemp("split") / "q", {"a": {"w": WIDE}})


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "q")


def refused(path, *words, verify=True):
    with pytest.raises(CheckpointError) as caught:
        load_params(path, verify=verify)
    for word in words:
        assert word in str(caught.value)


def piece(path, number):
    return path / f"params/a/state/a.w/0.{number}.0"


def test_a_flipped_bit(copy):
    data = bytearray(piece(copy, 5).read_bytes())
    data[7] ^= 1
    piece(copy, 5).write_bytes(data)
    refused(copy, "a/w: sha256 of the stored data is", "copy it again")


def test_two_pieces_that_were_exchanged(copy):
    first, second = (piece(copy, i).read_bytes() for i in (0, 1))
    piece(copy, 0).write_bytes(second)
    piece(copy, 1).write_bytes(first)
    refused(copy, "a/w: sha256")


@pytest.mark.parametrize("verify", [True, False])
def test_files_that_are_not_those_of_the_manifest(copy, verify):
    data = piece(copy, 3).read_bytes()
    piece(copy, 3).unlink()
    refused(copy, "a/w: ", "0.3.0 is missing", verify=verify)
    # Of the right number and size, but Zarr would take the missing one for zeros.
    piece(copy, 8).write_bytes(data)
    refused(copy, "a/w: ", "0.3.0 is missing", verify=verify)
    piece(copy, 3).write_bytes(data)
    refused(copy, "a/w: ", "0.8.0 is none of its 8 chunks", verify=verify)
    piece(copy, 8).unlink()
    piece(copy, 3).write_bytes(data[:-1])
    refused(copy, "a/w: ", "0.3.0 holds 127 bytes instead of 128", verify=verify)


def tampered(path, **changes):
    manifest = json.loads((path / "jaxq.json").read_text())
    entry = manifest["parts"]["a"]["tensors"]["a/w"]
    for key, value in changes.items():
        entry[key] = value
        if value is None:
            del entry[key]
    (path / "jaxq.json").write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": 0}, "a/w: chunks of [16, 4] do not split axis 0 of [16, 32]"),
        ({"split": 2}, "a/w: chunks of [16, 4] do not split axis 2 of [16, 32]"),
        ({"split": -1}, "a/w: -1 is not a size"),
        ({"split": True}, "a/w: True is not a size"),
        ({"split": None}, "a/w: "),  # as several processes would have written it
        ({"chunks": None}, "a/w: has a split, but no chunks"),
        ({"chunks": ["0" * 64] * 8}, "a/w: sha256 is not that of the chunks' digests"),
        ({"chunks": ["0" * 64] * 7}, "a/w: 7 chunks of [16, 4] do not make up [16, 32]"),
        ({"chunk_shape": [16, 8]}, "a/w: 8 chunks of [16, 8] do not make up [16, 32]"),
        ({"chunk_shape": [2, 32], "split": 0}, "a/w: "),  # the same bytes along another axis
        ({"chunk_shape": [8, 8]}, "a/w: chunks of [8, 8] do not split axis 1 of [16, 32]"),
        ({"shape": [32, 16]}, "a/w: "),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_manifest_that_lies_about_pieces(copy, changes, words, verify):
    refused(tampered(copy, **changes), words, verify=verify)


def test_a_stored_shape_that_is_another(copy):
    """Chunks and digests agree with the manifest, and Zarr says something else."""
    zarray = copy / "params/a/state/a.w/.zarray"
    text = zarray.read_text()
    assert '"shape":[16,8,4]' in text
    zarray.write_text(text.replace('"shape":[16,8,4]', '"shape":[16,4,8]'))
    assert orbax_io.stored_arrays(copy / "params/a")["a/w"][1] == (16, 4, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jq.checkpoint.parts._check_file", lambda *args, **options: None)
        refused(copy, "a/w: the manifest says int16[16, 8, 4], but int16[16, 4, 8] is stored")
