"""What the machine tells, and what is refused because of it."""

import dataclasses

import pytest

from jq.errors import OutputError, ResourceError
from jq.requirements import Machine, Rates, check, estimate, machine, requirements
from jq.requirements.arithmetic import COMPILE_SECONDS, Arithmetic
from jq.requirements.machine import PROCESS_BYTES, host_bytes, size
from tests.jq.requirements.runs import llama, run_on

RUN = run_on(llama())
NEEDED = requirements(RUN)
PLENTY = Machine(10**12, 10**12, 10**13, kind="H200")


def refusal(run, error, tmp_path, **changes) -> str:
    with pytest.raises(error) as caught:
        check(run, requirements(run), dataclasses.replace(PLENTY, **changes), tmp_path)
    return str(caught.value)


def test_what_fits_passes(tmp_path):
    check(RUN, NEEDED, PLENTY, tmp_path)
    check(RUN, NEEDED, Machine(None, None, None), tmp_path)
    exactly = Machine(NEEDED.device, NEEDED.host + PROCESS_BYTES, NEEDED.disk)
    check(RUN, NEEDED, exactly, tmp_path)


def test_the_devices_memory(tmp_path):
    text = refusal(RUN, ResourceError, tmp_path, device=16 * 10**9)
    assert text.startswith(f"H200: a block needs {size(NEEDED.device)} of memory (hidden states ")
    assert "and 16.00 GB are free: keep hidden states in host memory (--offload)" in text
    assert "--calib-samples" in text
    offloaded = run_on(llama(), offload=True, batch_size=64)
    text = refusal(offloaded, ResourceError, tmp_path, device=5 * 10**9)
    assert "a smaller --batch-size" in text
    assert "(--offload)" not in text
    check(
        offloaded, requirements(offloaded), dataclasses.replace(PLENTY, device=25 * 10**9), tmp_path
    )


def test_host_memory(tmp_path):
    offloaded = run_on(llama(), offload=True)
    text = refusal(offloaded, ResourceError, tmp_path, host=8 * 10**9)
    assert size(requirements(offloaded).host + PROCESS_BYTES) in text
    assert "8.00 GB are free" in text
    assert "--calib-samples" in text


def test_a_device_that_computes_in_host_memory(tmp_path):
    check(RUN, NEEDED, dataclasses.replace(PLENTY, device=1, own_memory=False), tmp_path)
    text = refusal(RUN, ResourceError, tmp_path, host=NEEDED.host + PROCESS_BYTES, own_memory=False)
    assert size(NEEDED.shared + PROCESS_BYTES) in text


def test_the_disk(tmp_path):
    text = refusal(RUN, OutputError, tmp_path, disk=10**9)
    assert f"{tmp_path}: output and journal need {size(NEEDED.disk)} and 1.00 GB are free" in text
    # What an unfinished run has written is there already.
    check(RUN, NEEDED, dataclasses.replace(PLENTY, disk=10**9), tmp_path, on_disk=NEEDED.disk)


def test_this_machine_tells(tmp_path):
    there = machine(tmp_path / "not" / "there")
    assert not there.own_memory
    assert there.device is None
    assert there.disk is not None
    assert there.disk > 0


def test_host_memory_is_read_where_linux_tells_it(tmp_path):
    info, group = tmp_path / "meminfo", tmp_path / "group"
    group.mkdir()
    assert host_bytes(info, group) is None
    info.write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert host_bytes(info, group) == 5000 * 1024
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000000\n")
    assert host_bytes(info, group) == 5000 * 1024
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    assert host_bytes(info, group) == 2_200_000


def test_time_is_counted_by_kind_of_work():
    rates = Rates(products=4e9, wide_products=2e9, moved=1e9, written=1e8)
    work = Arithmetic(8e9, 2e9, 3e9)
    assert estimate(work, rates, 10**8) == COMPILE_SECONDS + 2 * (2 + 1 + 3) + 1
    assert estimate(work.times(3), rates) - COMPILE_SECONDS == 36
