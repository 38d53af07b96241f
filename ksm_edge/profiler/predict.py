"""What a board that is not here is expected to do: time, memory and energy of inference and of adaptation.

Time is `roofline`'s model, of the kernels it is asked for; memory is the planner's, the same that a run is planned by.
Predictions are never shown as measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ksm_edge.autodiff.spec import GradientSpec
from ksm_edge.bundle.layers import Bundle
from ksm_edge.device import HOST, Device
from ksm_edge.errors import BudgetError
from ksm_edge.mask import score_shape
from ksm_edge.profiler.roofline import Kernels, Machine, seconds
from ksm_edge.profiler.work import FLOAT_BYTES, Work, graph_work, linear_work
from ksm_edge.runtimes import DEFAULT
from ksm_edge.training.planner import Plan, make_plan
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import learning_layers

CLASSES = 10
# Of a process with one task, measured for nine backbones: Python with ONNX Runtime and this package, and what the
# weights take while a session is made of them: the file that is mapped, fused, copied, and laid out for the kernels.
INFERENCE_PROCESS_BYTES = 70 * 2**20
WEIGHT_COPIES = 4.5
# Arrays that an update reads or writes once, for each weight and for each score: products, pristine and fused weights;
# score, mask and two moments, read and written.
ARRAYS_A_WEIGHT, ARRAYS_A_SCORE = 4, 8


@dataclass(frozen=True)
class Prediction:
    """Of one board. A time has a range: four of five measurements are expected within, as far as can be told."""

    device: Device
    kernels: Kernels
    inference_ms: float
    operators: tuple[tuple[Work, float], ...]  # of an inference, each with its milliseconds
    inference_bytes: int  # resident, of a process with one task
    step_ms: float | None  # None where adaptation does not fit, or nothing is known of it
    adaptation_operators: tuple[tuple[Work, float], ...]  # of one micro-batch and of the update
    steps: int
    plan: Plan | None
    refusal: str | None  # why adaptation does not fit

    @property
    def adaptation_minutes(self) -> float | None:
        """All steps; reading the images goes on meanwhile, and neither that nor judging and packing is counted."""
        return None if self.step_ms is None else self.step_ms * self.steps / 60_000

    @property
    def energy_watt_hours(self) -> tuple[float, float] | None:
        """Of an adaptation: at the board's idle power, and at what its power mode allows."""
        minutes = self.adaptation_minutes
        if minutes is None or not self.device.power_modes:
            return None
        return minutes / 60 * self.device.idle_watts, minutes / 60 * self.device.power_modes[0].watts

    @property
    def fits(self) -> bool | None:
        """Whether adaptation fits in memory; None where these kernels are no engine of ours."""
        return None if self.plan is None and self.refusal is None else self.plan is not None

    def range_of(self, value: float, *, adapting: bool = False) -> tuple[float, float]:
        """A time's range, of an inference or of an adaptation."""
        spread = self.kernels.adaptation_spread or self.kernels.spread if adapting else self.kernels.spread
        return value / spread, value * spread

    def as_json(self) -> dict[str, Any]:
        """Times in ms with their ranges, sizes in bytes."""
        energy, minutes = self.energy_watt_hours, self.adaptation_minutes
        plan = self.plan
        return {
            "device": self.device.name,
            "predicted": True,
            "kernels": {"of": self.kernels.describes, "fitted_on": self.kernels.fitted_on},
            "inference_ms": self.inference_ms,
            "inference_ms_range": self.range_of(self.inference_ms),
            "inference_operators": [_operator_json(*pair) for pair in self.operators],
            "inference_peak_bytes": self.inference_bytes,
            "fits": self.fits,
            "refusal": self.refusal,
            "memory_budget_bytes": self.device.memory_budget_bytes,
            "adaptation_peak_bytes": plan and plan.expected_peak_bytes,
            "step_ms": self.step_ms,
            "step_ms_range": self.step_ms and self.range_of(self.step_ms, adapting=True),
            "adaptation_operators": [_operator_json(*pair) for pair in self.adaptation_operators],
            "steps": self.steps,
            "adaptation_minutes": minutes,
            "adaptation_minutes_range": minutes and self.range_of(minutes, adapting=True),
            "energy_watt_hours": energy,
        }


def predict(
    bundle: Bundle,
    device: Device,
    *,
    images: int,
    settings: Settings,
    kernels: str = DEFAULT,
    classes: int = CLASSES,
    threads: int | None = None,
) -> Prediction:
    """Of one image through the backbone with a task, and of learning `images` of `classes` in `settings.epochs`.

    `threads`: all that the profile says if not given, and no more than it has cores. UsageError where the device's
    profile lacks what a prediction needs.
    """
    engine, threads = Kernels.load(kernels), min(threads or device.threads, device.cores)
    machine = _machine(device)
    features = graph_work(bundle.graph_path, bundle.input.size, eager=engine.eager)
    forward = [*features, linear_work("head", bundle.features, classes)]
    forward_ms = _milliseconds(forward, machine, engine, threads)
    settings = replace(settings, batch=min(settings.batch, images))
    plan, refusal, step_ms, adapting = None, None, None, list[tuple[Work, float]]()
    if engine.backward:  # an engine of its own, with memory of its own
        step_ms = settings.batch * sum(forward_ms) * (1 + engine.backward)
    elif engine.adaptation:
        try:
            plan = make_plan(bundle, classes, settings, threads=threads, budget_bytes=device.memory_budget_bytes)
        except BudgetError as error:
            refusal = str(error)
    if plan is not None:
        update = update_work(bundle, settings)
        # numpy's loops run in one thread, and cost next to nothing to start.
        update_ms = _milliseconds(update, machine, replace(engine, overhead_cycles=0), 1)
        # Workers that share the threads take as long for a run each as all threads for one run after the other.
        runs, step_ms = -(-settings.batch // plan.micro_batch), sum(update_ms)
        for each in plan.stages:
            share, gradient = len(each.stage.epochs) / settings.epochs, gradient_work(bundle, each.graph.spec)
            gradient_ms = _milliseconds(gradient, machine, engine, threads)
            step_ms += share * runs * engine.adaptation * sum(gradient_ms)
            adapting += [(work, share * engine.adaptation * ms) for work, ms in zip(gradient, gradient_ms, strict=True)]
        adapting += zip(update, update_ms, strict=True)
    return Prediction(
        device=device,
        kernels=engine,
        inference_ms=sum(forward_ms),
        operators=tuple(zip(forward, forward_ms, strict=True)),
        inference_bytes=inference_bytes(bundle, forward),
        step_ms=step_ms,
        adaptation_operators=tuple(adapting),
        steps=settings.epochs * -(-images // settings.batch),
        plan=plan,
        refusal=refusal,
    )


def inference_bytes(bundle: Bundle, works: Sequence[Work]) -> int:
    """Resident, at the peak, of a process that opens a task and runs one image."""
    weights = FLOAT_BYTES * sum(w.weight.size + w.bias.size for w in bundle.weights.values())
    moved = max(work.bytes for work in works if work.operator != "Gemm")
    return int(INFERENCE_PROCESS_BYTES + WEIGHT_COPIES * weights + moved)


def gradient_work(bundle: Bundle, spec: GradientSpec) -> list[Work]:
    """Of one run of the gradient graph: forward, loss and backward of one micro-batch."""
    import onnx

    from ksm_edge.autodiff.gradient_graph import build

    inference = onnx.load(bundle.graph_path, load_external_data=False)
    return graph_work(build(inference, bundle.layers, spec).model, spec.size)


def update_work(bundle: Bundle, settings: Settings) -> list[Work]:
    """Of the update, layer by layer: it only reads and writes arrays."""
    trained, masked = learning_layers(bundle.layers, settings)
    found = []
    for layer in bundle.layers:
        if layer.name in trained:
            arrays = ARRAYS_A_WEIGHT * int(np.prod(layer.weight_shape))
            if layer.name in masked:
                arrays += ARRAYS_A_SCORE * int(np.prod(score_shape(layer.weight_shape, settings.granularity)))
            found.append(Work(f"{layer.name}.update", "Update", "memory", 0.0, float(FLOAT_BYTES * arrays)))
    return found


def _machine(device: Device) -> Machine:
    return Machine.here(device.clock_mhz) if device.name == HOST else Machine.of(device)


def _milliseconds(works: Sequence[Work], machine: Machine, kernels: Kernels, threads: int) -> list[float]:
    return [1e3 * value for value in seconds(works, machine, kernels, threads)]


def _operator_json(work: Work, ms: float) -> dict[str, Any]:
    return {**vars(work), "ms": ms}
