"""From format to format: tensors stay what they are, byte for byte."""

import json

import pytest

from jq import api, checkpoint, tree
from jq.errors import CheckpointError, ModelError, SpecError
from jq.formats.convert import convert
from jq.formats.plan import FormatOptions
from jq.formats.reader import QuantizedCheckpoint
from jq.models import Decoder, ModelConfig
from jq.models.safetensors_file import SafetensorsFile
from jq.spec import QuantSpec, w8a8
from tests.formats import models
from tests.formats.models import W4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.write_source(tmp_path_factory.mktemp("models") / "source")


def own(out, source, spec, ordered=False):
    """A jaxq checkpoint with random QTensors."""
    params = models.quantized(
        source, lambda path: None if "layers_1/mlp" in path else spec, ordered
    )
    model = Decoder(ModelConfig.from_folder(source))
    meta, report = {"model": "source"}, {"blocks": []}
    api.save(out, model, params, config_files_from=source, meta=meta, report=report)
    return params


def tensors(folder):
    """Name -> dtype, shape, bytes, of all weight files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        reader = SafetensorsFile(file)
        arrays = {name: reader.read(name) for name in reader.tensors}
        found |= {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}
    return found


@pytest.mark.parametrize(
    ("target", "spec", "ordered", "options"),
    [
        ("gptq", W4, False, FormatOptions()),
        ("gptq", W4, True, FormatOptions("gptq")),
        ("awq", W4, False, FormatOptions()),
        (
            "compressed-tensors",
            QuantSpec("int4", 16, False),
            True,
            FormatOptions(None, "float16", True),
        ),
        ("compressed-tensors", w8a8(activation="tensor", static=True), False, FormatOptions()),
    ],
)
def test_there_and_back_again(tmp_path, source, target, spec, ordered, options):
    params = own(tmp_path / "own", source, spec, ordered)
    steps = []
    made = convert(
        tmp_path / "own",
        tmp_path / "theirs",
        target,
        options=options,
        progress=lambda *step: steps.append(step),
    )
    assert (made.path, made.linears) == (tmp_path / "theirs", 11)
    assert [done for done, _, _ in steps] == list(range(1, len(params) + 1))
    assert {total for _, total, _ in steps} == {len(params)}
    convert(tmp_path / "theirs", tmp_path / "back")
    if not ordered:
        models.assert_same(checkpoint.load_params(tmp_path / "back"), params)
    convert(tmp_path / "back", tmp_path / "again", target, options=options, shard_bytes=2000)
    assert tensors(tmp_path / "again") == tensors(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "direct", target, options=options, shard_bytes=2000)
    assert tensors(tmp_path / "direct") == tensors(tmp_path / "theirs")


def test_files_and_facts_go_along(tmp_path, source):
    own(tmp_path / "own", source, W4)
    convert(tmp_path / "own", tmp_path / "theirs", "awq")
    convert(tmp_path / "theirs", tmp_path / "back")
    assert checkpoint.read_manifest(tmp_path / "back").meta == {"model": "source"}
    for folder in ("theirs", "back"):
        assert json.loads((tmp_path / folder / "report.json").read_text()) == {"blocks": []}
        for name, data in models.SMALL.items():
            assert (tmp_path / folder / name).read_bytes() == data
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == models.RAW


def test_between_two_other_formats(tmp_path, source):
    params = own(tmp_path / "own", source, W4)
    convert(tmp_path / "own", tmp_path / "gptq", "gptq")
    convert(tmp_path / "gptq", tmp_path / "awq", "awq")
    convert(tmp_path / "awq", tmp_path / "ct", "compressed-tensors")
    read = QuantizedCheckpoint(tmp_path / "ct", place=models.on_host).load()
    models.assert_same(read, params)


def test_refusals_leave_nothing(tmp_path, source):
    own(tmp_path / "own", source, W4, ordered=True)
    convert(tmp_path / "own", tmp_path / "gptq", "gptq")
    before = sorted(tmp_path.iterdir())
    for folder in ("own", "gptq"):
        with pytest.raises(SpecError, match=r"awq cannot express .*layers_0/.*no act order"):
            convert(tmp_path / folder, tmp_path / "out", "awq")
    with pytest.raises(ModelError, match="is a jaxq checkpoint already"):
        convert(tmp_path / "own", tmp_path / "out")
    with pytest.raises(ModelError, match="is not quantized; `jaxq quantize`"):
        convert(source, tmp_path / "out", "gptq")
    assert sorted(tmp_path.iterdir()) == before


def test_damage_is_noticed_and_leaves_nothing(tmp_path, source):
    own(tmp_path / "own", source, W4)
    convert(tmp_path / "own", tmp_path / "awq", "awq")
    file = tmp_path / "awq" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)
    last = max(SafetensorsFile(file).tensors.items(), key=lambda item: item[1].end)[0]
    with pytest.raises(CheckpointError, match=f"{last}: sha256"):
        convert(tmp_path / "awq", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["awq", "own"]
    assert tree.has(checkpoint.load_params(tmp_path / "own"), "embed/embedding")
