"""A damaged, incomplete or lying checkpoint is refused by name, and never cast, followed or run."""

import json
import os
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from jq.checkpoint import check_files, load_params, orbax_io, read_manifest, reader
from jq.errors import CheckpointError
from tests.checkpoint.trees import assert_same, data_file, small_tree, write

UP = "layers_0/mlp/up_proj/kernel"
CONFIG = b'{"hidden_size": 24}'


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound checkpoint, to be copied and not to be touched."""
    path = tmp_path_factory.mktemp("sound") / "q"
    return write(path, small_tree(), files={"config.json": CONFIG, "generation_config.json": b""})


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "q")


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def edit(path, change):
    """Apply `change` to the parsed manifest."""
    file = path / "jaxq.json"
    node = json.loads(file.read_text())
    change(node)
    file.write_text(json.dumps(node))


def tensor(node, path):
    return node["parts"][path.split("/")[0]]["tensors"][path]


def refused(path, *words, verify=True):
    """Loading raises one CheckpointError that holds all the words."""
    with pytest.raises(CheckpointError) as caught:
        load_params(path, verify=verify)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


ARRAYS = [
    *("embed/embedding", "layers_0/input_norm/scale", f"{UP}/codes", f"{UP}/scale"),
    f"{UP}/order",
]


@pytest.mark.parametrize("path", ARRAYS)
@pytest.mark.parametrize("where", [0, 0.37, 0.999])
def test_one_flipped_bit_of_data(copy, path, where):
    file = data_file(copy, path)
    flip(file, int(where * 8 * file.stat().st_size))
    refused(copy, path, "sha256", "copy it again")


def test_one_flipped_bit_anywhere(copy, sound):
    """Files beside the data as well: Orbax's, Zarr's and the manifest."""
    others = [p for p in sorted(copy.glob("params/embed/**/*")) if p.is_file()]
    assert len(others) == 6
    rng = np.random.default_rng(0)
    for file in [*others, copy / "jaxq.json"]:
        original = file.read_bytes()
        for bit in rng.integers(0, 8 * len(original), 4 if original else 0).tolist():
            flip(file, bit)
            if _changed(copy, sound):
                with pytest.raises(CheckpointError):
                    load_params(copy)
            file.write_bytes(original)
    assert_same(load_params(copy), small_tree())


def _changed(copy, sound):
    """Whether a flip is one that must be seen: some letters of the caller's facts are free."""
    try:
        return read_manifest(copy).parts == read_manifest(sound).parts and not _same(copy, sound)
    except CheckpointError:
        return True


def _same(copy, sound):
    files = [p.relative_to(sound) for p in sound.rglob("*") if p.is_file()]
    return all(
        (copy / f).read_bytes() == (sound / f).read_bytes() for f in files if f.name != "jaxq.json"
    )


@pytest.mark.parametrize("path", ARRAYS)
@pytest.mark.parametrize("verify", [True, False])
def test_truncated_data(copy, path, verify):
    file = data_file(copy, path)
    size = file.stat().st_size
    os.truncate(file, size - 1)
    refused(copy, path, f"{size - 1} bytes", f"instead of {size}", verify=verify)


def test_data_that_is_too_long(copy):
    file = data_file(copy, "embed/embedding")
    file.write_bytes(file.read_bytes() + b"\0")
    refused(copy, "embed/embedding", "1537 bytes", "instead of 1536")


@pytest.mark.parametrize("name", ["_METADATA", "embed.embedding/.zarray"])
def test_truncated_bookkeeping(copy, name):
    file = copy / "params" / "embed" / "state" / name
    size = file.stat().st_size
    os.truncate(file, size // 2)
    refused(copy, file.name, f"{size // 2} bytes", f"instead of {size}", verify=False)


def test_missing_things(copy):
    file = data_file(copy, f"{UP}/scale")
    data = file.read_bytes()
    file.unlink()
    refused(copy, f"{UP}/scale", "no data")
    file.write_bytes(data)
    zarray = file.with_name(".zarray")
    zarray.rename(zarray.with_name("kept"))
    refused(copy, ".zarray", "missing")
    zarray.with_name("kept").rename(zarray)
    assert_same(load_params(copy), small_tree())
    shutil.rmtree(copy / "params" / "layers_0")
    refused(copy, "layers_0", "missing")
    assert_same(load_params(copy, parts=["embed"]), {"embed": small_tree()["embed"]})


def test_no_manifest(copy, tmp_path):
    (copy / "jaxq.json").unlink()
    refused(copy, "jaxq.json is missing")
    refused(tmp_path / "nowhere", "jaxq.json is missing")


@pytest.mark.parametrize("what", ["params", "params/embed", "state", "data", "jaxq.json"])
def test_links_are_not_followed(copy, what):
    places = {
        "state": copy / "params" / "embed" / "state",
        "data": data_file(copy, "embed/embedding"),
    }
    path = places.get(what, copy / what)
    aside = copy.parent / "aside"
    path.rename(aside)
    path.symlink_to(aside)
    refused(copy, path.name)


def test_the_checkpoint_itself_may_be_behind_a_link(copy):
    link = copy.parent / "link"
    link.symlink_to(copy)
    assert_same(load_params(link), small_tree())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ('{"format": "jaxq"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "JSON list"),
        ("\xff", "not valid JSON"),
        ('{"format": "jaxq", "format": "jaxq"}', "'format' stands there twice"),
        ('{"format": "gguf"}', "'gguf'"),
        ('{"format": "jaxq", "format_version": 4}', "format_version is 4"),
        ('{"format": "jaxq", "format_version": true}', "True"),
        ('{"format": "jaxq", "format_version": 1, "packing_layout": 7}', "packing_layout is 7"),
        ('{"format": "jaxq", "format_version": 1, "packing_layout": 1}', "'parts' is missing"),
    ],
)
def test_manifests_of_another_kind(copy, text, words):
    (copy / "jaxq.json").write_bytes(text.encode("latin-1"))
    refused(copy, words)


def _set(path, **values):
    return lambda node: tensor(node, path).update(values)


def _set_field(path, field, **values):
    return lambda node: tensor(node, path)["fields"][field].update(values)


def _set_spec(path, **values):
    return lambda node: tensor(node, path)["spec"].update(values)


def _rename_part(name):
    return lambda node: node["parts"].update({name: node["parts"].pop("embed")})


def _rename_tensor(name):
    def change(node):
        tensors = node["parts"]["embed"]["tensors"]
        tensors[name] = tensors.pop("embed/embedding")

    return change


def _rename_file(name):
    def change(node):
        files = node["parts"]["embed"]["files"]
        files[name] = files.pop("state/_METADATA")

    return change


LIES = {
    "dtype": (_set("embed/embedding", dtype="float16"), ("float16[32, 24]", "bfloat16[32, 24]")),
    "shape": (_set("embed/embedding", shape=[24, 32]), ("bfloat16[24, 32]", "bfloat16[32, 24]")),
    "size": (_set("embed/embedding", shape=[32, 25]), ("1536 bytes", "instead of 1600")),
    "huge": (_set("embed/embedding", shape=[1 << 40, 1 << 40]), ("embed/embedding", "1536 bytes")),
    "negative": (_set("embed/embedding", shape=[-1, 24]), ("embed/embedding", "-1")),
    "fraction": (_set("embed/embedding", shape=[32.0, 24]), ("embed/embedding", "32.0")),
    "digest": (_set("embed/embedding", sha256="0" * 64), ("embed/embedding", "0" * 64)),
    "no digest": (_set("embed/embedding", sha256="none"), ("embed/embedding", "'none'")),
    "object dtype": (_set("embed/embedding", dtype="object"), ("embed/embedding", "'object'")),
    "kind": (_set("embed/embedding", kind="pickle"), ("embed/embedding", "'pickle'")),
    "extra key": (_set("embed/embedding", offset=0), ("embed/embedding", "'offset'")),
    "bits": (_set_spec(UP, dtype="int3"), (UP, "uint8[12, 16]", "uint8[9, 16]")),
    "bits 8": (_set_spec(UP, dtype="int8"), (UP, "uint8[12, 16]", "int8[24, 16]")),
    "group size": (_set_spec(UP, group_size=4), (UP, "[3, 16]", "[6, 16]")),
    "bad group": (_set_spec(UP, group_size=7), (UP, "group_size 7", "24 inputs")),
    "zeros": (_set_spec(UP, symmetric=False), (UP, "zero_point")),
    "not a flag": (_set_spec(UP, symmetric=1), (UP, "'symmetric'", "1")),
    "scale dtype": (
        _set_spec(UP, scale_dtype="float16"),
        (UP, "bfloat16[3", "float16[3"),
    ),
    "scale kind": (_set_spec(UP, scale_dtype="float64"), (UP, "'float64'")),
    "granularity": (_set_spec(UP, granularity="row"), (UP, "'row'")),
    "weight dtype": (_set_spec(UP, dtype="int9"), (UP, "'int9'")),
    "dtype type": (_set_spec(UP, dtype=4), (UP, "dtype", "4")),
    "activation": (_set_spec(UP, activation={"dtype": "int8"}), (UP, "'granularity' is missing")),
    "spec key": (_set_spec(UP, rotation=1), (UP, "'rotation'")),
    "k": (_set(UP, k=32), (UP, "uint8[12, 16]", "uint8[16, 16]")),
    "n": (_set(UP, n=8), (UP, "uint8[12, 16]", "uint8[12, 8]")),
    "codes dtype": (_set_field(UP, "codes", dtype="int8"), (UP, "int8[12, 16]", "uint8[12, 16]")),
    "codes shape": (_set_field(UP, "codes", shape=[192]), (UP, "(192,)")),
    "codes lead": (_set_field(UP, "codes", shape=[1, 12, 16]), (UP, "[3, 16]", "[1, 3, 16]")),
    "part up": (_rename_part(".."), ("'..'",)),
    "part path": (_rename_part("../embed"), ("'../embed'",)),
    "absolute part": (_rename_part("/etc"), ("'/etc'",)),
    "tensor up": (_rename_tensor("embed/../../x"), ("'embed/../../x'",)),
    "other part": (_rename_tensor("layers_0/embedding"), ("'layers_0/embedding'", "'embed'")),
    "other name": (_rename_tensor("embed/table"), ("embed/table", "no data")),
    "file up": (_rename_file("../../../secret"), ("'../../../secret'",)),
    "absolute file": (_rename_file("/etc/passwd"), ("'/etc/passwd'",)),
    "copied file up": (
        lambda node: node["files"].update({"../x": node["files"]["config.json"]}),
        ("'../x'",),
    ),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("verify", [True, False])
def test_lying_manifest(copy, lie, verify):
    change, words = LIES[lie]
    edit(copy, change)
    if lie == "digest" and not verify:
        assert_same(load_params(copy, verify=False), small_tree())
        return
    refused(copy, *words, verify=verify)


def test_a_tensor_the_manifest_forgot(copy):
    edit(copy, lambda node: node["parts"]["layers_0"]["tensors"].pop("layers_0/input_norm/scale"))
    refused(copy, "layers_0/input_norm/scale", "manifest")


def test_stored_dtype_is_never_cast(copy):
    """The lie told consistently: manifest, sizes and digests agree, the stored dtype does not."""
    zarray = copy / "params" / "embed" / "state" / "embed.embedding" / ".zarray"
    text = zarray.read_text()
    assert '"bfloat16"' in text
    zarray.write_text(text.replace('"bfloat16"', '"<f2"'))
    size = zarray.stat().st_size
    name = "state/embed.embedding/.zarray"
    edit(copy, lambda node: node["parts"]["embed"]["files"][name].update(bytes=size))
    refused(copy, "embed/embedding", "bfloat16[32, 24]", "float16[32, 24]", verify=False)


def test_a_cast_by_orbax_would_be_seen(copy, monkeypatch):
    load = orbax_io.load_tree

    def casting(folder, target):
        found = load(folder, target)
        if "embed" in found:
            found["embed"]["embedding"] = found["embed"]["embedding"].astype(np.float32)
        return found

    monkeypatch.setattr(reader.orbax_io, "load_tree", casting)
    refused(copy, "embed/embedding", "bfloat16[32, 24]", "float32[32, 24]")


def test_an_order_that_is_no_permutation(tmp_path):
    params = small_tree()
    kernel = params["layers_0"]["mlp"]["up_proj"]["kernel"]
    object.__setattr__(kernel, "order", jnp.zeros(24, jnp.int32))
    refused(write(tmp_path / "q", params), f"{UP}/order", "permutation of 0 to 23")


def test_copied_files_are_compared(copy):
    manifest = read_manifest(copy)
    check_files(copy, manifest)
    (copy / "generation_config.json").write_text('{"temperature": 0.7}')  # the user's to edit
    check_files(copy, manifest)
    (copy / "config.json").write_bytes(CONFIG.replace(b"24", b"42"))
    with pytest.raises(CheckpointError, match=re.escape("config.json is not what was written")):
        check_files(copy, manifest)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        check_files(copy, manifest)


def test_orbax_logs_nothing(copy, caplog):
    load_params(copy)
    zarray = copy / "params" / "embed" / "state" / "embed.embedding" / ".zarray"
    zarray.write_bytes(b"x" * zarray.stat().st_size)
    refused(copy, "'embed' cannot be read", verify=False)
    assert caplog.records == []
