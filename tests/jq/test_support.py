"""The support matrix: what the kernels say themselves, what the README prints, what is refused."""

import re
from pathlib import Path

import pytest

from jq import support
from jq.errors import SpecError
from jq.gpus import GPUS, lacking
from jq.kernels.choice import REFERENCE, explain, kernel_weight
from jq.methods.rtn import RTN
from jq.pallas_kernels import quantize_rows
from jq.pallas_kernels.capability import SERVED
from jq.pallas_kernels.w4a16 import supported
from jq.pallas_kernels.w8a8 import supported8
from jq.preflight import check_gpu
from jq.recipe import Rule, uniform
from jq.spec import FP8, QuantSpec, w4a16, w8a8

SPECS = {
    "int4": w4a16(),
    "int8": w8a8(),
    "fp8": w8a8(FP8),
    "other": QuantSpec("int8", -1),
}
CAPABILITIES = [row.capability for row in support.rows()] + [(12, 0), (10, 3), (6, 1)]


def kernels_say(product: str, capability) -> bool:
    """Whether the kernels themselves serve a well-shaped weight."""
    if product == "other" or capability is None:
        return False
    w = kernel_weight(SPECS[product], 4096, 4096, "bfloat16")
    return (supported if product == "int4" else supported8)(w, 16, capability) is None


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("product", SPECS)
def test_the_table_says_what_the_kernels_and_the_dispatcher_say(product, capability):
    spec = SPECS[product]
    assert support.product_of(spec) == product
    cell = support.support(capability, product)
    assert (cell.verdict == "kernel") == kernels_say(product, capability)
    assert (cell.verdict == "kernel") == (cell.reason is None)
    if capability is not None:
        probe = type("Probe", (), {"spec": spec, "k": 4096, "n": 4096})()
        choice = explain(probe, device="sm_{}{}".format(*capability))
        assert (choice.kernel != REFERENCE) == (cell.verdict == "kernel")
        assert cell.reason is None or cell.reason in choice.reason


def test_activations_are_quantized_where_8_bit_products_have_kernels():
    assert set(SERVED) == set(support.KERNELS["int8"])
    for capability in support.KERNELS["int8"]:
        fp8 = quantize_rows.supported_rows(4096, "bfloat16", FP8, capability)
        assert (fp8 is None) == (capability in support.KERNELS["fp8"])


def test_every_known_gpu_is_in_the_table_once():
    names = [name for row in support.rows() for name in row.names]
    assert sorted(names) == sorted(GPUS)
    for row in support.rows():
        assert {GPUS[name].capability for name in row.names} <= {row.capability}


def test_no_kernel_where_there_is_no_arithmetic():
    for product in ("int8", "fp8"):
        for capability in support.KERNELS[product]:
            assert lacking(capability, product) is None


def test_the_readme_prints_the_table():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert support.markdown() in readme


@pytest.mark.parametrize(
    ("gpu", "product", "said"),
    [
        (
            "a100",
            "fp8",
            ("a100-40gb (sm_80)", "no fp8 tensor cores", "--method smoothquant", "sm_89"),
        ),
        ("sm_86", "fp8", ("sm_86", "--method gptq")),
        ("t4", "int8", ("8.0 or newer, not 7.5", "sm_80", "--allow-reference")),
        ("v100", "other", ("not 7.0",)),
    ],
)
def test_what_a_gpu_lacks_is_refused_with_the_alternatives(gpu, product, said):
    recipe = (Rule("head", None, None), *uniform(SPECS[product], RTN()))
    with pytest.raises(SpecError) as caught:
        check_gpu(recipe, gpu)
    for text in said:
        assert text in str(caught.value)
    check_gpu(recipe, gpu, allow_reference=True)


@pytest.mark.parametrize(
    ("gpu", "product"),
    [
        ("h200", "fp8"),
        ("8.9", "fp8"),
        ("a100", "int8"),
        ("a10", "int4"),
        ("b200", "int4"),
        ("h100", "other"),
    ],
)
def test_what_a_gpu_runs_passes(gpu, product):
    check_gpu(uniform(SPECS[product], RTN()), gpu)


def test_without_a_name_the_gpu_of_this_process_counts(monkeypatch):
    recipe = uniform(SPECS["fp8"], RTN())
    check_gpu(recipe, None)
    monkeypatch.setattr("jq.preflight.capability_of", lambda _: ((8, 0), "NVIDIA A100"))
    with pytest.raises(SpecError, match=re.escape("NVIDIA A100 (sm_80)")):
        check_gpu(recipe, None)
    check_gpu(recipe, None, local=False)
    check_gpu(recipe, None, allow_reference=True)


def test_gpus_are_found_by_name_and_by_capability():
    assert support.find_capability("a100") == ((8, 0), "a100-40gb")
    assert support.find_capability("sm_120") == ((12, 0), "sm_120")
    assert support.find_capability("9.0") == ((9, 0), "9.0")
    with pytest.raises(SpecError, match="unknown"):
        support.find_capability("sm_x")
