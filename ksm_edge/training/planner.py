"""From a memory budget to a plan: how many images run at once, and what the whole process is expected to take."""

from __future__ import annotations

from dataclasses import dataclass

from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import BudgetError
from ksm_edge.mask import score_shape
from ksm_edge.runtimes.compile import CompiledGraph, compiled
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import forward_spec, gradient_spec

# Measured: Python with numpy, ONNX Runtime, Pillow, this package and an open training session, before any weight.
PROCESS_BYTES = 90 * 2**20
# The arena rounds up and keeps what it had to split.
ACTIVATION_SHARE = 1.25
# Batches of images alive at once: in use, waiting, in the making.
BATCHES_ALIVE = 3
# Packing looks at all masks at once: two scales in float32, two keep bits, and the coder's positions.
PACKING_BYTES = 28  # a score
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
    forward: CompiledGraph  # its forward pass, for validation


def make_plan(bundle: Bundle, classes: int, settings: Settings, *, threads: int, budget_bytes: int | None) -> Plan:
    """The plan for these settings, within the budget if there is one.

    Raises BudgetError, naming the smallest budget that would do, before anything is started.
    """
    micro_batch = 1 if settings.statistics == "frozen" else settings.batch
    graph = compiled(bundle, gradient_spec(bundle, classes, settings, micro_batch))
    need = expected_peak_bytes(bundle, classes, settings, _activation_bytes(graph))
    if budget_bytes is not None and need > budget_bytes:
        raise BudgetError(
            f"adapting {bundle.recipe} at {bundle.input.size}x{bundle.input.size} px in steps of {settings.batch} "
            f"images needs about {_mib(need)} MiB ({_mib(_activation_bytes(graph))} of it for the activations of "
            f"{micro_batch}), the budget is {budget_bytes // 2**20} MiB. Give --memory-budget {_mib(need)}MiB or more, "
            "a smaller --batch, a smaller --size at export, or --method head."
        )
    single = _activation_bytes(graph)
    while settings.statistics == "frozen" and micro_batch * 2 <= settings.batch:
        following = single * micro_batch * 2
        peak = expected_peak_bytes(bundle, classes, settings, following)
        if following > COMFORTABLE_BYTES or (budget_bytes is not None and peak > budget_bytes):
            break
        micro_batch *= 2
    while micro_batch > graph.spec.micro_batch:
        larger = compiled(bundle, gradient_spec(bundle, classes, settings, micro_batch))
        # Several images are transposed for their products, one is not: they may take more than their number says.
        if (
            budget_bytes is None
            or expected_peak_bytes(bundle, classes, settings, _activation_bytes(larger)) <= budget_bytes
        ):
            graph = larger
        else:
            micro_batch //= 2
    activations = _activation_bytes(graph)
    peak = expected_peak_bytes(bundle, classes, settings, activations)
    forward = compiled(bundle, forward_spec(graph.spec))
    return Plan(settings.batch, micro_batch, threads, activations, peak, graph, forward)


def expected_peak_bytes(bundle: Bundle, classes: int, settings: Settings, activation_bytes: int) -> int:
    """Resident bytes of the whole process at its worst moment: a training step, or the packing behind an epoch."""
    _, scores = _counts(bundle, settings)
    stepping = activation_bytes + BATCHES_ALIVE * settings.batch * 3 * bundle.input.size**2 * FLOAT_BYTES
    packing = PACKING_BYTES * scores
    return PROCESS_BYTES + parameter_bytes(bundle, classes, settings) + max(stepping, packing)


def _activation_bytes(graph: CompiledGraph) -> int:
    return int(graph.activation_bytes * ACTIVATION_SHARE)


def parameter_bytes(bundle: Bundle, classes: int, settings: Settings) -> int:
    """Weights as stored, as fused and their products; scores with Adam's two moments; the head with its own."""
    weights, scores = _counts(bundle, settings)
    head = classes * (bundle.features + 1) * 4  # parameter, gradient and two moments
    if settings.method == "head":
        return FLOAT_BYTES * (2 * weights + head)
    return FLOAT_BYTES * (3 * weights + 3 * scores + head)


def _counts(bundle: Bundle, settings: Settings) -> tuple[int, int]:
    """How many conv weights there are, and how many scores the settings give them."""
    weights = sum(w.weight.size for w in bundle.weights.values())
    if settings.method != "ksm":
        return weights, 0
    return weights, sum(_size(score_shape(layer.weight_shape, settings.granularity)) for layer in bundle.layers)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _mib(count: float) -> int:
    return -int(-count // 2**20)
