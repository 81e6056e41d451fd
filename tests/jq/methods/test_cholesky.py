"""The factorisation that devices share, against float64, in a process that has eight of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jq.methods import cholesky
from tests.devices import EIGHT, on_eight, run_with
from tests.jq import problems
from tests.processes import run_processes

pytestmark = pytest.mark.usefixtures("fast_compiles")


@pytest.mark.skipif(EIGHT, reason="this is that process")
def test_on_eight_devices():
    run_with(8, __file__)


def factors(matrix, devices: int, size: int) -> np.ndarray:
    """[devices, K, K], what each of them has in the end."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("all",))

    def local(matrix):
        return cholesky.blocked_cholesky(matrix, "all", size)[None]

    shared = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P("all"), check_vma=False)
    return np.asarray(jax.jit(shared)(jnp.asarray(matrix)))


@on_eight
@pytest.mark.parametrize(
    ("devices", "k", "size"),
    [
        (8, 128, 8),
        (8, 60, 4),  # a number of blocks that neither panels nor devices divide
        (8, 24, 8),  # fewer blocks than devices
        (3, 64, 16),
        (2, 16, 16),  # a single block
    ],
)
def test_every_device_has_the_factor(devices, k, size):
    gram = problems.gram(k)
    expected = np.linalg.cholesky(gram.astype(np.float64))
    # Of the upper triangle nothing counts.
    found = factors(np.tril(gram) + np.triu(np.full_like(gram, 1e3), 1), devices, size)
    for own in found:
        # Bit for bit: what follows must take the same turns on all devices.
        np.testing.assert_array_equal(own, found[0])
    assert problems.relative_error(np.tril(found[0]), expected) < 1e-5
    assert not np.triu(found[0], 1).any()


@pytest.mark.parametrize(("k", "size"), [(128, 8), (60, 4), (16, 16)])
def test_one_device_alone(k, size, monkeypatch):
    gram = problems.gram(k)
    expected = np.linalg.cholesky(gram.astype(np.float64))
    found = cholesky.blocked_cholesky(jnp.asarray(gram), None, size)
    assert problems.relative_error(found, expected) < 1e-5
    # What libraries may not reach the end of is not given to them.
    monkeypatch.setattr(cholesky, "LIBRARY_ROWS", k - 1)
    monkeypatch.setattr(cholesky, "BLOCK", size)
    monkeypatch.setattr(jax.lax.linalg, "cholesky", only_below(k, jax.lax.linalg.cholesky))
    found = cholesky.cholesky(jnp.asarray(gram), None)
    assert problems.relative_error(found, expected) < 1e-5


def only_below(k, library):
    """The library's factorisation, of smaller matrices only (a single block is one)."""

    def factor(matrix, **options):
        assert matrix.shape[0] < k or k == 16
        return library(matrix, **options)

    return factor


@on_eight
@pytest.mark.parametrize("place", [0, 13, 63])
def test_what_is_not_positive_definite_is_seen_by_all(place):
    gram = problems.gram(64)
    gram[place, place] = -1
    for own in factors(gram, 8, 8):
        assert np.isnan(np.diagonal(own)).any()


def test_small_matrices_and_odd_sizes_are_not_shared():
    assert cholesky.block_rows(8192, 8) == cholesky.BLOCK
    assert cholesky.block_rows(14336, 64) == cholesky.BLOCK
    assert cholesky.block_rows(8960, 8) == 448
    assert cholesky.block_rows(4096, 8) is None
    assert cholesky.block_rows(8192, 1) is None
    assert cholesky.block_rows(46336, 1) is None
    assert cholesky.block_rows(49152, 1) == cholesky.BLOCK
    assert cholesky.block_rows(8209, 8) is None  # a prime


@pytest.mark.parametrize(("count", "devices"), [(28, 8), (56, 8), (104, 8), (56, 3)])
def test_the_work_is_dealt_out_evenly(count, devices):
    owner = cholesky.owners(count, devices)
    work = np.bincount(owner, weights=np.arange(count) ** 2, minlength=devices)
    assert owner.dtype == np.int32
    assert work.max() < 1.2 * work.mean()


@pytest.mark.parametrize("k", [8192, 14336, 53248])
def test_operations(k):
    """Of one device all; of eight more than their part, by what panels and corners cost."""
    whole = k**3 / 3
    assert cholesky.products(k, 1) == whole
    assert 1 < 8 * cholesky.products(k, 8) / whole < 1 + 7000 / k


HOSTS = """
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jq.methods import cholesky
from tests.jq import problems

gram = problems.gram(64)
mesh = Mesh(np.array(jax.devices()), ("all",))
here = NamedSharding(mesh, P())
given = jax.make_array_from_callback(gram.shape, here, lambda index: gram[index])
shared = jax.shard_map(
    lambda a: cholesky.blocked_cholesky(a, "all", 8),
    mesh=mesh,
    in_specs=P(),
    out_specs=P(),
    check_vma=False,
)
found = np.asarray(jax.jit(shared)(given))
assert problems.relative_error(found, np.linalg.cholesky(gram.astype(np.float64))) < 1e-5
"""


@pytest.mark.slow
@pytest.mark.skipif(EIGHT, reason="starts processes of its own")
def test_the_devices_of_several_processes():
    assert len(run_processes(HOSTS, 2, devices=2)) == 2
