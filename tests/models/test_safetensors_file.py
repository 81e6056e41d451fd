"""The safetensors reader and writer, against the reference implementation and damaged files."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jq.errors import CheckpointError
from jq.models.safetensors_file import DTYPES, SafetensorsFile, write_safetensors

ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 5), np.float16),
    "bytes": np.array([1, 2, 3], np.uint8),
}


def header_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_reference_writes(tmp_path):
    save_file(ARRAYS, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert set(file.tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(file.read(name), array, strict=True)
    assert not file.read("matrix").flags.writeable


def test_the_reference_reads_what_we_write(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", ARRAYS, {"format": "pt"})
    loaded = load_file(tmp_path / "a.safetensors")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_comes_back_bit_by_bit(tmp_path, code):
    dtype = DTYPES[code]
    bits = np.random.default_rng(0).integers(0, 2, (6, 8 * dtype.itemsize), dtype=np.uint8)
    data = np.packbits(bits, axis=1) if code != "BOOL" else bits[:, :1]
    array = data.reshape(-1).view(dtype).reshape(2, 3)
    write_safetensors(tmp_path / "a.safetensors", {"x": array})
    back = SafetensorsFile(tmp_path / "a.safetensors").read("x")
    assert back.dtype == dtype
    assert back.tobytes() == array.tobytes()


def test_strided_and_big_endian_arrays_keep_their_values(tmp_path):
    arrays = {
        "transposed": ARRAYS["matrix"].T,
        "strided": ARRAYS["matrix"][:, ::2],
        "big": ARRAYS["matrix"].astype(">f4"),
        "bf16": ARRAYS["matrix"].T.astype(ml_dtypes.bfloat16),
    }
    write_safetensors(tmp_path / "a.safetensors", arrays)
    file = SafetensorsFile(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name), array)


def test_dtypes_without_a_name_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="x: dtype complex64 cannot be stored"):
        write_safetensors(tmp_path / "a.safetensors", {"x": np.zeros(2, np.complex64)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file has 0"),
        (b"\x01\x00", "the file has 2"),
        (b"PK\x03\x04" + bytes(100), "not a safetensors file"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "header claims 9223372036854775808 bytes"),
        (header_bytes(b"{"), "not valid JSON"),
        (header_bytes(b"[" * 100_000), "not valid JSON"),
        (header_bytes(b"\xff\xfe"), "not valid JSON"),
        (header_bytes([]), "must be a JSON object"),
        (header_bytes({"x": 3}), "'x': the header entry needs"),
        (header_bytes({"x": entry()}, bytes(3)), "expected 7. bytes, the file has 7."),
        (header_bytes({"x": entry()}, bytes(5)), "truncated or padded"),
        (header_bytes({"x": entry("F99")}, bytes(4)), "dtype 'F99' is unknown; known: BOOL"),
        (header_bytes({"x": entry(shape=(2,))}, bytes(4)), "needs 8 bytes, the offsets .* give 4"),
        (header_bytes({"x": entry(shape=(-1,))}, bytes(4)), "malformed shape"),
        (header_bytes({"x": entry(shape=(1 << 62, 1 << 62))}, bytes(4)), "needs 8507059173"),
        (header_bytes({"x": entry(offsets=(4, 0))}, bytes(4)), "the offsets .* give -4"),
        (header_bytes({"x": entry(), "y": entry()}, bytes(4)), "'y' overlaps the one before"),
        (header_bytes({"x": entry(offsets=(4, 8))}, bytes(8)), "'x' leaves a hole before it"),
        (
            header_bytes(b'{"x": %b, "x": %b}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
            "duplicate key 'x'",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
