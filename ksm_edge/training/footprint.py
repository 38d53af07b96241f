"""What the process of a training is expected to take of memory: the model that plans are made by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ksm_edge.autodiff.spec import HALF_SHARE, REST, fused_shape, product_shape, transformed_shape
from ksm_edge.bundle.layers import Bundle
from ksm_edge.mask import score_shape
from ksm_edge.runtimes.compile import CompiledGraph
from ksm_edge.training.settings import MOMENT_BITS, Settings
from ksm_edge.training.suited import amplifies, rate_scale
from ksm_edge.training.trainer import learning_layers

# The shares and bytes below were chosen so that of the adaptations of benchmarks/memory.py none took more than was
# expected, and the one that was expected to take the most beside what it took was as near as it could be.
# Python with numpy, ONNX Runtime, Pillow, this package and an open training session, before any weight; and what stays
# at the heap's end, see `use_compact_heap`.
PROCESS_BYTES = 149 * 2**19
# Of these what opens images, which is over by then where views of them are kept.
OPENING_BYTES = 5 * 2**20
# Arena and heap round up, and keep what they had to split.
ACTIVATION_SHARE, PARAMETER_SHARE = 1.21, 1.14
# Weights as they are stored, where a graph reads them: pages around them come along.
PAGES_SHARE = 1.15
# Each further worker takes its activations, with a thread and scratch memory of its own.
WORKER_SHARE = 1.34
# Images that wait for a step, in parts of a micro-batch; beside these one part is in use, one in the making, and one
# is being put together. Each further worker has its own in use, and the one that it was copied from.
IMAGES_AHEAD, PARTS_IN_HAND = 4, 3
# The update works on one layer after the other, with more arrays of its size than room that activations have left.
LAYER_COPIES = 1.25
# Moments in few bits save less than they are smaller by: of the rest's share there is less to spare.
COMPACT_BYTES = 1  # a score
# Scores that leave the kept ones before masks are thinned, as a share of all: at MobileNetV2's rate one in eight is
# cut, and where kernels are amplified as many again; at a higher rate more, of ResNet-20 two thirds. From trainings of
# as many steps as usual, and thrice as many. PACKING_BYTES, for each of them: packing looks at all at once, at places,
# scales and the coder's bits.
APART_SHARE, MOST_APART = 1 / 8, 2 / 3
PACKING_BYTES = 26
# A graph is compiled by a process of its own, which has its constants as the optimiser lays them out, and around the
# largest of them copies; the one that waits for it has the rest. Chosen so that of ten backbones with all weights as
# constants, and ResNet-20 with none, both together (as `limits.py` counts) took no more. benchmarks/memory.py holds
# adaptations to it.
COMPILING_BYTES, LAYER_BYTES, CONSTANT_COPIES = 183 << 19, 220 << 10, 3.2
FLOAT_BYTES = 4


def expected_peak_bytes(
    bundle: Bundle,
    classes: int,
    settings: Settings,
    workers: int,
    graph: CompiledGraph,
    beside: Sequence[CompiledGraph] = (),
) -> int:
    """Resident bytes at the worst moment: a training step, the packing behind an epoch, or compiling the graphs first,
    which is done by a process of its own.

    `beside`: graphs that run in between.
    """
    trained, _ = learning_layers(bundle.layers, settings)
    largest = max((_size(layer.weight_shape) for layer in bundle.layers if layer.name in trained), default=0)
    in_front = sum(_size(layer.weight_shape) for layer in bundle.layers if layer.name not in graph.forms)
    running = (
        _running_bytes(each, workers) + (0 if each.spec.backward else FLOAT_BYTES * in_front)
        for each in (graph, *beside)
    )
    scores = score_count(bundle, settings)
    stepping = max(running) + int(LAYER_COPIES * FLOAT_BYTES * largest)
    packing = int(PACKING_BYTES * apart_share(bundle, scores, classes, settings) * scores)
    # Weights a second time.
    turned, stored = (
        FLOAT_BYTES * sum(_size(shape) for name, shape in graph.inputs.items() if name.endswith(kind))
        for kind in (".turned", ".pristine")
    )
    spare = COMPACT_BYTES * scores if settings.moment_bits < MOMENT_BITS[0] else 0
    parameters = int(PARAMETER_SHARE * (parameter_bytes(bundle, classes, settings, graph.forms) + spare))
    parameters += turned + int(PAGES_SHARE * stored) + (workers - 1) * _accumulator_bytes(graph)
    rooms = workers * max(each.room_bytes for each in (graph, *beside))  # which stay from one graph to the next
    whole = PROCESS_BYTES - (OPENING_BYTES if settings.views else 0) + parameters + rooms + max(stepping, packing)
    return max(whole, compiling_bytes(bundle, settings))


def compiling_bytes(bundle: Bundle, settings: Settings) -> int:
    """Of compiling the graph that has most constants: the weights of layers that do not learn."""
    trained, _ = learning_layers(bundle.layers, settings)
    constants = [FLOAT_BYTES * _size(layer.weight_shape) for layer in bundle.layers if layer.name not in trained]
    copies = int(CONSTANT_COPIES * max(constants, default=0))
    return COMPILING_BYTES + LAYER_BYTES * len(bundle.layers) + sum(constants) + copies


def _running_bytes(graph: CompiledGraph, workers: int) -> int:
    """Of activations, the parts of a step's images that are there, and features that nobody has taken yet."""
    parts = parts_ahead(graph.spec.micro_batch, workers) + PARTS_IN_HAND + 2 * (workers - 1)
    # Features are read from disk as bytes, and made into numbers: a part more is there.
    parts += graph.spec.part == REST
    features = (workers + 1) * _size(graph.outputs.get("features", (0,)))
    return activation_bytes(graph, workers) + FLOAT_BYTES * (parts * _size(graph.inputs["image"]) + features)


def parts_ahead(micro_batch: int, workers: int) -> int:
    """How many parts of a step's images are made before they are asked for, which workers do at the same time."""
    return max(workers, IMAGES_AHEAD // micro_batch)


def _accumulator_bytes(graph: CompiledGraph) -> int:
    return FLOAT_BYTES * sum(_size(shape) for name, shape in graph.inputs.items() if name.startswith("acc:"))


def activation_bytes(graph: CompiledGraph, workers: int = 1) -> int:
    share = ACTIVATION_SHARE + (workers - 1) * WORKER_SHARE
    return int(graph.activation_bytes * share * (HALF_SHARE if graph.halved else 1))


def parameter_bytes(bundle: Bundle, classes: int, settings: Settings, forms: Mapping[str, str]) -> int:
    """Weights as fused, the products of those that learn; scores with Adam's two moments; the head.

    `forms`: of each layer, see `CompiledGraph`; those of a front have none, and are there while it runs. Weights as
    stored are looked at layer by layer and leave memory again.
    """
    trained, _ = learning_layers(bundle.layers, settings)
    floats = 4 * classes * (bundle.features + 1)  # the head: parameter, gradient and two moments
    for layer in bundle.layers:
        if layer.name not in forms:
            continue
        form = forms[layer.name]
        # Of a layer that does not learn the weight is a constant of two graphs: training's, and the judge's.
        beside = product_shape(form, layer) if layer.name in trained else layer.weight_shape
        floats += _size(fused_shape(form, layer)) + _size(beside)
        floats += _size(layer.weight_shape) if form == "channel" else 0  # a constant of the graph
        floats += _size(transformed_shape(layer)) if form == "winograd" else 0  # as it runs
    scores = score_count(bundle, settings)
    return FLOAT_BYTES * (floats + scores) + 2 * scores * settings.moment_bits // 8


def apart_share(bundle: Bundle, scores: int, classes: int, settings: Settings) -> float:
    """The share of so many scores that is expected to be cut or amplified when that is the most."""
    faster = settings.score_rate / Settings().score_rate
    faster *= rate_scale(bundle).score if settings.scaled_rates else 1
    ways = 2 if amplifies(bundle, scores, classes, settings) else 1
    return min(MOST_APART, APART_SHARE * max(1.0, ways * faster))


def score_count(bundle: Bundle, settings: Settings) -> int:
    """How many there are."""
    _, masked = learning_layers(bundle.layers, settings)
    shapes = (score_shape(layer.weight_shape, settings.granularity) for layer in bundle.layers if layer.name in masked)
    return sum(map(_size, shapes))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
