"""A sample alone on the device, compiled as users compile it: the same bits as among others.

XLA sees through a loop over an array of one, fuses what is inside otherwise, and rounds otherwise.
"""

import jax
import numpy as np

from jq import tree
from jq.calib.stages import Stream, run_stage
from jq.methods.rtn import rtn_quantize
from jq.spec import w8a8
from tests.calib import decoders


def test_a_sample_alone_rounds_as_among_others():
    model, params, _, _ = decoders.make()
    block, kind = params["layers_0"], model.block_kind("layers_0")
    for name in "qkv":
        path = f"attention/{name}_proj/kernel"
        rounded = rtn_quantize(tree.get(block, path), w8a8()).to_qtensor(w8a8())
        block = tree.replace(block, path, rounded)
    h = model.embed(params, decoders.tokens())
    found = []
    for stream in (Stream(h, None, None), Stream(np.asarray(h), None, None)):
        for index in (0, 1):
            stream = run_stage(
                model, kind, index, block, stream, collect=False, batch_size=1
            ).stream
        found.append(jax.device_get((stream.x, stream.carry)))
    jax.tree.map(np.testing.assert_array_equal, *found)
