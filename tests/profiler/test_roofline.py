"""The model of time: what it must do whatever its numbers are, and that the numbers in use are those of the script."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ksm_edge.device import Device, device_names
from ksm_edge.errors import UsageError
from ksm_edge.profiler.roofline import Kernels, Machine, seconds
from ksm_edge.profiler.work import Work

MACHINE = Machine(clock_hz=1e9, flop_per_second=8e9, bytes_per_second=2e9)
KERNELS = Kernels(
    "x", "", "", dense=2, pointwise=0.5, depthwise=0.1, traffic=1.5, overhead_cycles=1e4, in_order=0.5, spread=1.2
)
WORKS = [Work(kind, "Conv", kind, 8e9, 2e9) for kind in ("dense", "pointwise", "depthwise")]


def test_time_is_arithmetic_and_memory_and_overhead() -> None:
    assert seconds(WORKS, MACHINE, KERNELS, 1) == pytest.approx([0.5 + 1.5 + 1e-5, 2 + 1.5 + 1e-5, 10 + 1.5 + 1e-5])
    assert seconds([Work("add", "Add", "memory", 1e9, 2e9)], MACHINE, KERNELS, 1) == pytest.approx([1.5 + 1e-5])


def test_threads_shorten_the_arithmetic_alone() -> None:
    assert seconds(WORKS[1:2], MACHINE, KERNELS, 4) == pytest.approx([0.5 + 1.5 + 1e-5])


def test_an_in_order_core_comes_less_near_to_its_peak() -> None:
    assert seconds(WORKS[1:2], replace(MACHINE, in_order=True), KERNELS, 1) == pytest.approx([4 + 1.5 + 1e-5])


@pytest.mark.parametrize("name", ["ncnn", "onnxruntime", "pytorch"])
def test_kernels_say_whose_they_are_and_what_they_were_fitted_on(name: str) -> None:
    kernels = Kernels.load(name)
    assert kernels.describes
    assert kernels.fitted_on
    assert kernels.spread > 1
    assert min(kernels.dense, kernels.pointwise, kernels.depthwise, kernels.traffic) > 0


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(UsageError, match="no numbers of the kernels of 'tflite': choose from ncnn, onnxruntime"):
        Kernels.load("tflite")


@pytest.mark.parametrize("name", [name for name in device_names() if name != "host"])
def test_every_board_can_be_predicted(name: str) -> None:
    machine = Machine.of(Device.load(name))
    assert machine.flop_per_second >= 8 * machine.clock_hz
    assert 1e9 < machine.bytes_per_second < 1e11


def test_a_profile_that_lacks_a_number_says_which() -> None:
    with pytest.raises(UsageError, match="does not say flop_per_cycle, copy_bytes_per_second"):
        Machine.of(replace(Device.load("jetson"), flop_per_cycle=0, copy_bytes_per_second=0))


def test_this_machine_is_measured() -> None:
    machine = Machine.measured(3e9)
    assert 1e9 < machine.flop_per_second < 1e12
    assert 1e8 < machine.bytes_per_second < 1e12
