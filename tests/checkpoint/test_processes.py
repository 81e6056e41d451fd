"""Programs of several processes read checkpoints, each for itself, and do not write them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.trees import small_tree, write

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
path, address, index = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jq.checkpoint import CheckpointWriter, load_params
from jq.errors import CheckpointError
from tests.checkpoint.trees import assert_same, small_tree

expected = small_tree()
if jax.process_index() == 1:  # alone: no process waits for another
    assert_same(load_params(path, parts=["embed"]), {"embed": expected["embed"]})
mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
codes = lambda params: params["layers_0"]["mlp"]["up_proj"]["kernel"].codes
found = codes(load_params(path, shardings=lambda path, shape: NamedSharding(
    mesh, P(None, "a") if path.endswith("codes") else P())))
assert [s.data.shape for s in found.addressable_shards] == [(12, 4)] * 2
whole = multihost_utils.process_allgather(found, tiled=True)
np.testing.assert_array_equal(whole, np.asarray(codes(expected)))
try:
    CheckpointWriter(path + "2").__enter__()
except CheckpointError as error:
    assert f"this one is {index} of 2" in str(error)
else:
    raise AssertionError("a writer was opened")
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    path = write(tmp_path / "q", small_tree())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(path), address, str(index)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]
