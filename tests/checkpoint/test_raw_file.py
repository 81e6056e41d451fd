"""Arrays in plain files: what was written comes back, and nothing else does."""

import jax.numpy as jnp
import numpy as np
import pytest

from jq.checkpoint import files
from jq.checkpoint.raw_file import read_array, write_array
from jq.errors import CheckpointError, OutputError


@pytest.fixture
def array():
    return np.random.default_rng(0).normal(size=(3, 4, 5)).astype(jnp.bfloat16)


def test_an_array_comes_back(tmp_path, array):
    for shown in (array, array[:, ::2], array.swapaxes(0, 1), array[:0]):
        entry = write_array(tmp_path / "0", shown)
        back = read_array(tmp_path / "0", entry)
        assert (back.dtype, back.shape) == (shown.dtype, shown.shape)
        assert back.tobytes() == shown.tobytes()
    swapped = array.astype(">f4")
    assert np.array_equal(read_array(tmp_path / "0", write_array(tmp_path / "0", swapped)), swapped)


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_damage_is_refused(tmp_path, array, damage):
    file = tmp_path / "0"
    entry = write_array(file, array)
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data if damage == "flipped" else data[:-1])
    if damage == "missing":
        file.unlink()
    said = {"flipped": "sha256 is ", "short": "holds 119 bytes instead of 120"}
    with pytest.raises(CheckpointError, match=f"/0:? {said.get(damage, 'is missing')}"):
        read_array(file, entry)


def test_a_full_disk_is_told(tmp_path, array, monkeypatch):
    with pytest.raises(OutputError, match="no_such_folder"):
        write_array(tmp_path / "no_such_folder" / "0", array)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Use", (), {"free": 100}))
    with pytest.raises(OutputError, match="120 bytes are needed and 100 are free"):
        write_array(tmp_path / "0", array)
