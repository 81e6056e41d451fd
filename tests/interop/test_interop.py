"""Folders that jaxq writes in the tools that load them, and folders that tools write in jaxq.

Skipped unless JAXQ_INTEROP names the clients' environments: tests/interop/run makes them.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from jq.demo_model import demo_model_path
from jq.formats.convert import convert
from jq.formats.plan import FormatOptions
from jq.models import Tokenizer
from jq.models.safetensors_file import SafetensorsFile
from tests.interop import cases, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(running.environments() is None, reason="tests/interop/run runs these"),
]

# Of the largest logit. float32 clients differ by summation order only; GPTQModel computes in
# float16, whose unit is 5e-4.
TOLERANCE = {running.TRANSFORMERS: 2e-5, running.GPTQMODEL: 5e-3, running.AUTOAWQ: 2e-5}
# The same where activations are rounded to 8 bits, which amplifies the last bit of anything. (The
# tools differ in the rounding too: compressed-tensors divides the largest |x| by 127.5, we by 127.)
ROUNDED = 5e-2
# Of the largest weight: products of code and scale, rounded once by float16 clients.
WEIGHTS = {running.TRANSFORMERS: 1e-6, running.GPTQMODEL: 1e-3, running.AUTOAWQ: 1e-6}

ROWS: list[running.Row] = []


@pytest.fixture(scope="module")
def source():
    """The model: JAXQ_INTEROP_MODEL, or the embedded one."""
    return Path(os.environ.get("JAXQ_INTEROP_MODEL", demo_model_path()))


@pytest.fixture(scope="module")
def tokens(source):
    """int32 [4, 128] of real text."""
    text = (demo_model_path() / "calibration.txt").read_text(encoding="utf-8")
    ids = np.asarray(Tokenizer(source).encode(text[:20_000])[:512], np.int32)
    return ids.reshape(4, 128)


@pytest.fixture(scope="module")
def made(source, tokens, tmp_path_factory):
    """(direction, folder) of everything that is opened."""
    root = tmp_path_factory.mktemp("interop")
    np.save(root / "tokens.npy", tokens)
    for name in ("jaxq", *running.MAKERS):
        (root / name).mkdir()
    cases.write_all(source, tokens, root / "jaxq")
    for environment, program in running.MAKERS.items():
        running.run_client(environment, program, source, root / "tokens.npy", root / environment)
    return {name: sorted((root / name).iterdir()) for name in ("jaxq", *running.MAKERS)}


@pytest.fixture(scope="module", autouse=True)
def shown(made):
    """The table, at the end."""
    yield
    text = running.table(ROWS)
    print(f"\n{text}")
    if file := os.environ.get("JAXQ_INTEROP_TABLE"):
        Path(file).write_text(text + "\n", encoding="utf-8")


def method_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]


@pytest.mark.parametrize("direction", ["jaxq", *running.MAKERS])
@pytest.mark.parametrize("client", running.LOADERS)
def test_logits_and_weights_are_equal(made, direction, client, tokens, tmp_path):
    folders = [f for f in made[direction] if client in running.client_of(f, method_of(f))]
    if not folders:
        pytest.skip(f"{direction} makes nothing that {client} reads")
    np.save(tmp_path / "tokens.npy", tokens)
    environment, program = running.LOADERS[client]
    running.run_client(environment, program, tmp_path / "tokens.npy", tmp_path, *folders)
    rows = [r for f in folders for r in running.compare(f, direction, client, tokens, tmp_path)]
    ROWS.extend(rows)
    wrong = [
        row
        for row in rows
        if row.relative > (ROUNDED if row.rounded else TOLERANCE[client])
        or row.weights > WEIGHTS[client]
    ]
    assert not wrong, running.table(wrong)


@pytest.mark.parametrize("direction", ["jaxq", *running.MAKERS])
def test_tensors_come_back_byte_for_byte(made, direction, tmp_path):
    """Through a jaxq checkpoint and into the same format again."""
    for folder in made[direction]:
        told = json.loads((folder / "config.json").read_text())["quantization_config"]
        options = FormatOptions(told.get("checkpoint_format"))
        convert(folder, tmp_path / "orbax", overwrite=True)
        convert(
            tmp_path / "orbax",
            tmp_path / "back",
            told["quant_method"],
            options=options,
            shard_bytes=3_000_000,
            overwrite=True,
        )
        before, after = stored(folder), stored(tmp_path / "back")
        assert before.keys() == after.keys(), folder.name
        different = [name for name, found in before.items() if found != after[name]]
        assert not different, (folder.name, different[:5])


def stored(folder):
    """Tensor -> dtype, shape and bytes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        reader = SafetensorsFile(file)
        arrays = {name: reader.read(name) for name in reader.tensors}
        found |= {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}
    return found
