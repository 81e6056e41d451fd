"""Fixtures of the model tests."""

import pytest

from jq.models.decoder import Decoder
from jq.models.hf_weights import HFCheckpoint
from tests.models import checkpoints


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """name -> (model, params, raw config, checkpoint weights), each made once."""
    made = {}

    def load(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            weights = checkpoints.write(folder, checkpoints.CONFIGS[name])
            checkpoint = HFCheckpoint(folder)
            model = Decoder(checkpoint.config)
            made[name] = model, checkpoint.load(), checkpoints.CONFIGS[name], weights
        return made[name]

    return load
