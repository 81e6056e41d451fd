"""Reading another tool's folder takes a file and a linear more than what comes of it."""

import jax
import pytest

import jq
from jq.qtensor import QTensor
from scripts.bench_import_memory import Bench, measure, write_folder
from scripts.bench_memory import model_config

FORMATS = ["gptq", "gptq-act-order", "awq", "compressed-tensors", "float8"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_folders_are_models(tmp_path, form):
    config = model_config(512, 1)
    folder = write_folder(tmp_path, config, form)
    _, params = jq.load(tmp_path)
    kernel = params["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(kernel, QTensor)
    assert kernel.shape == (512, 1408)
    assert (kernel.order is not None) == (form == "gptq-act-order")
    assert folder.file_bytes > 2 * folder.linear_bytes
    assert folder.linear_bytes < 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(kernel))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_the_peak_is_a_file_and_a_linear_above_the_parameters(form):
    written, result = measure(Bench(format=form, hidden=1536), 4)
    assert result.param_bytes > 3 * written.file_bytes
    allowed = written.file_bytes + written.linear_bytes
    assert result.peak_bytes - result.param_bytes < allowed, (written, result)
