"""From a memory budget to a plan: how many images run at once, and what the whole process is expected to take."""

from __future__ import annotations

from dataclasses import dataclass

from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import BudgetError
from ksm_edge.mask import score_shape
from ksm_edge.runtimes.compile import CompiledGraph, compiled
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import gradient_spec

# Measured: Python with numpy, ONNX Runtime, Pillow and this package resident, before any image or weight.
PROCESS_BYTES = 62 * 2**20
# The arena rounds up and keeps what it had to split; images and batches wait in the queue.
ACTIVATION_SHARE = 1.25
# Micro-batches until a run's activations take this much: small networks spend their time in the calls otherwise.
COMFORTABLE_BYTES = 16 * 2**20
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Plan:
    """What was decided, and what it costs."""

    batch: int  # images in an optimizer step
    micro_batch: int  # images in one run of the gradient graph
    threads: int
    activation_bytes: int
    expected_peak_bytes: int  # resident, of the whole process
    graph: CompiledGraph


def make_plan(bundle: Bundle, classes: int, settings: Settings, *, threads: int, budget_bytes: int | None) -> Plan:
    """The plan for these settings, within the budget if there is one.

    Raises BudgetError, naming the smallest budget that would do, before anything is started.
    """
    single = compiled(
        bundle, gradient_spec(bundle, classes, settings, 1 if settings.statistics == "frozen" else settings.batch)
    )
    fixed = PROCESS_BYTES + parameter_bytes(bundle, classes, settings)
    need = fixed + _activation_bytes(single)
    if budget_bytes is not None and need > budget_bytes:
        raise BudgetError(
            f"adapting {bundle.recipe} at {bundle.input.size}x{bundle.input.size} needs about {_mib(need)} MiB "
            f"(parameters {_mib(need - PROCESS_BYTES - _activation_bytes(single))}, activations "
            f"{_mib(_activation_bytes(single))}, the process itself {_mib(PROCESS_BYTES)}), the budget is "
            f"{_mib(budget_bytes)} MiB. Give --memory-budget {_mib(need)}MiB or more, a smaller image size at export, "
            "or --method head."
        )
    graph = single
    micro_batch = 1
    while settings.statistics == "frozen" and micro_batch * 2 <= settings.batch:
        following = _activation_bytes(single) * micro_batch * 2
        if following > COMFORTABLE_BYTES or (budget_bytes is not None and fixed + following > budget_bytes):
            break
        micro_batch *= 2
    if micro_batch > 1:
        graph = compiled(bundle, gradient_spec(bundle, classes, settings, micro_batch))
    activations = _activation_bytes(graph)
    return Plan(settings.batch, graph.spec.micro_batch, threads, activations, fixed + activations, graph)


def _activation_bytes(graph: CompiledGraph) -> int:
    return int(graph.activation_bytes * ACTIVATION_SHARE)


def parameter_bytes(bundle: Bundle, classes: int, settings: Settings) -> int:
    """Weights as stored and as fused, their products, scores and Adam's moments, and the head with its own."""
    weights = sum(w.weight.size for w in bundle.weights.values())
    head = classes * (bundle.features + 1) * 4  # parameter, gradient and two moments
    if settings.method == "head":
        return FLOAT_BYTES * (2 * weights + head)
    shapes = {layer.name: layer.weight_shape for layer in bundle.layers}
    scores = sum(_size(score_shape(shape, settings.granularity)) for shape in shapes.values())
    moments = 3 * scores if settings.method == "ksm" else 0
    # Validation fuses the weights a second time, and its session packs them once more.
    return FLOAT_BYTES * (4 * weights + moments + head)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _mib(count: float) -> int:
    return -int(-count // 2**20)
