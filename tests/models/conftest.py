"""Fixtures of the model tests."""

import pytest

from jq.models.decoder import Decoder
from jq.models.hf_weights import HFCheckpoint
from tests.models import checkpoints


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """name -> (model, params, raw config, checkpoint weights), each made once."""
    made = {}

    def load(name, layers=2):
        if (name, layers) not in made:
            folder = tmp_path_factory.mktemp(name)
            raw = checkpoints.CONFIGS[name] | {"num_hidden_layers": layers}
            if "layer_types" in raw:
                raw["layer_types"] = raw["layer_types"][:layers]
            weights = checkpoints.write(folder, raw)
            checkpoint = HFCheckpoint(folder)
            made[name, layers] = Decoder(checkpoint.config), checkpoint.load(), raw, weights
        return made[name, layers]

    return load
