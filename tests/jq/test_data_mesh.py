"""What a run remembers of its mesh."""

from types import SimpleNamespace

import numpy as np
import pytest

from jq import data_mesh


@pytest.mark.parametrize(
    ("owners", "fact"),
    [([0, 0, 1, 1], "4 devices"), ([0, 1, 0, 1], "4 devices of processes 0 1 0 1")],
)
def test_a_mesh_out_of_order_is_another_one(owners, fact, monkeypatch):
    devices = np.array([SimpleNamespace(process_index=owner) for owner in owners])
    cut = SimpleNamespace(mesh=SimpleNamespace(devices=devices), size=len(owners))
    monkeypatch.setattr(data_mesh, "checked_mesh", lambda mesh, axis: cut)
    assert data_mesh.mesh_fact(None, "data") == fact


def test_no_mesh_is_one_device():
    assert data_mesh.mesh_fact(None, "data") == "1 device"
