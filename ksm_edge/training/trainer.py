"""The trainer: sessions of the gradient graph and the layers that learn, one optimizer step at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ksm_edge import native
from ksm_edge.autodiff.spec import FLOATS, FRONT, HALVES, REST, STANDARD, WHOLE, GradientSpec
from ksm_edge.bundle.layers import Bundle, Layer, select
from ksm_edge.errors import KsmEdgeError, UsageError
from ksm_edge.mask import score_shape
from ksm_edge.pack.quantize import dequantize_difference, quantize_difference
from ksm_edge.runtimes.compile import CompiledGraph
from ksm_edge.runtimes.engine import Engine
from ksm_edge.runtimes.workers import Session
from ksm_edge.training.adam import Adam, rate_factor
from ksm_edge.training.layer import TrainedLayer
from ksm_edge.training.settings import ACTIVATION_BITS, PRODUCT_BITS, Settings
from ksm_edge.training.stages import stages
from ksm_edge.training.suited import RateScale, amplifies, most_cut, rate_scale
from ksm_edge.training.thinning import late_step, thin

ONE_THREAD = Engine()
TILE_BYTES = 2**22  # see `GradientSpec`: larger weights are read too often where memory is slow beside arithmetic

Images = np.ndarray | Iterable[np.ndarray]  # (n, 3, S, S), or what the front made of them; or parts, one by one


def in_parts(images: Images) -> Iterable[np.ndarray]:
    """The parts; one, where they come all at once."""
    return (images,) if isinstance(images, np.ndarray) else images


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw: mean loss per image and correct answers, before the step's change."""

    loss: float
    correct: int
    count: int
    waited_ms: float = field(default=0.0, compare=False)  # for images, while nothing was computed


@dataclass(frozen=True)
class _MicroBatch:
    """Images, or what the front made of them, and target rows (n, C) of one run.

    `release`: behind it activations give up their memory.
    """

    images: np.ndarray
    targets: np.ndarray
    release: bool


class Trainer:
    """Scores, batch-norm and head of one task in training, on one backbone that is never written to."""

    def __init__(
        self,
        bundle: Bundle,
        graph: CompiledGraph,
        settings: Settings,
        *,
        steps: int,
        engine: Engine = ONE_THREAD,
    ) -> None:
        """`graph`: compiled from `gradient_spec`; `steps`: of the whole run, which the schedule of the rates spans."""
        micro_batch, classes = graph.spec.micro_batch, graph.spec.classes
        if settings.statistics == "batch" and micro_batch != settings.batch:
            raise UsageError(
                f"batch statistics need the whole batch in one micro-batch: batch {settings.batch}, "
                f"micro-batch {micro_batch}. Make them equal, or keep the statistics frozen."
            )
        _, masked = learning_layers(bundle.layers, settings)
        scores = sum(
            math.prod(score_shape(layer.weight_shape, settings.granularity))
            for layer in bundle.layers
            if layer.name in masked
        )
        settings = replace(settings, amplify=amplifies(bundle, scores, classes, settings))
        self.bundle, self.settings, self.steps, self.micro_batch = bundle, settings, steps, micro_batch
        self.count = 0  # optimizer steps done
        scale = rate_scale(bundle) if settings.scaled_rates else RateScale()
        norm_rate = settings.norm_rate * scale.norm
        # Each at its full value; what `update` takes follows the schedule.
        self.rates = {
            "score": settings.score_rate * scale.score,
            "gamma": norm_rate,
            "beta": norm_rate,
            "head": settings.head_rate * scale.head,
        }
        self.layers = {
            layer.name: TrainedLayer(
                layer,
                bundle.weights[layer.name],
                graph.forms[layer.name],
                settings,
                masked=layer.name in masked,
                turned=f"{layer.name}.turned" in graph.inputs,
            )
            for layer in bundle.layers
            if layer.name in graph.spec.trained
        }
        self._settled = np.zeros(1, np.uint8)  # 1: masks were thinned, and what is kept stays
        self._share = settings.thin if scores else 0.0  # of the cut ones, that is put back; None: down to so many
        self._most_cut = most_cut(bundle, scores, classes, settings) if self._share is None else scores
        self.head_weight = _first_head(settings, classes, bundle.features)
        self.head_bias = np.zeros(classes, np.float32)
        self.run_head = self.head_weight.copy()  # as the graph has it
        self.head_learning = {"weight": Adam(self.head_weight), "bias": Adam(self.head_bias)}
        self._head_gradients = {n: np.zeros_like(a.parameter) for n, a in self.head_learning.items()}
        self._engine = engine
        self._open(graph)

    def go_on_with(self, graph: CompiledGraph) -> None:
        """Learn by another graph from here on: that of images of another size, its layers in the same forms."""
        if graph is not self._graph:
            del self._workers  # whose memory is for the next ones
            self._open(graph)

    def _open(self, graph: CompiledGraph) -> None:
        self._graph = graph
        self._workers = self._engine.open(self.bundle, graph, self.bound(graph))

    def bound(self, graph: CompiledGraph) -> dict[str, np.ndarray]:
        """The arrays that a session of `graph` is to be bound to."""
        arrays = {f"head:d{name}": array for name, array in self._head_gradients.items()}
        arrays |= {"head:weight": self.run_head, "head:bias": self.head_bias}
        for layer in self.layers.values():
            arrays |= layer.bound()
        wanted = {name.removeprefix("acc:") for name in graph.inputs}
        return {name: array for name, array in arrays.items() if name in wanted}

    def step(self, images: Images, targets: np.ndarray, *, release: bool = False) -> StepResult:
        """One optimizer step on `Images` with weighted target distributions (n, C), see `autodiff.loss`.

        The images may come in parts, so that they need not be in memory all at once. With frozen statistics the result
        is that of one batch, however it is cut into micro-batches. `release` gives the activations' memory back behind
        the step.
        """
        result = self.accumulate(images, targets, release=release)
        self.update()
        return result

    def accumulate(self, images: Images, targets: np.ndarray, *, release: bool = False) -> StepResult:
        """The first half of a step: the gradients of these images."""
        self._workers.empty()
        batches = self._micro_batches(images, targets, release)
        waited_ms = self._workers.waited_ms
        found = list(self._workers.map(self._micro_step, batches, releases=lambda batch: batch.release))
        self._workers.gather()
        return StepResult(
            loss=sum(loss for loss, _ in found),
            correct=sum(correct for _, correct in found),
            count=len(targets),
            waited_ms=self._workers.waited_ms - waited_ms,
        )

    def _micro_batches(self, images: Images, targets: np.ndarray, release: bool) -> Iterator[_MicroBatch]:
        done = 0
        for part in in_parts(images):
            for start in range(0, len(part), self.micro_batch):
                few = part[start : start + self.micro_batch]
                rows = targets[done : done + len(few)]
                done += len(few)
                yield _MicroBatch(few, rows, release and done == len(targets))

    def _micro_step(self, session: Session, batch: _MicroBatch) -> tuple[float, int]:
        """Loss, and how many answers are right."""
        n = len(batch.images)
        session.image[:n], session.target[:n] = batch.images, batch.targets
        session.image[n:], session.target[n:] = 0, 0  # rows of zeros do not count
        session.run(release=batch.release)
        if self.settings.statistics == "batch":
            self._observe(session, n)
        answers = session.output("logits")[:n].argmax(axis=1)
        return float(session.output("loss")), int((answers == batch.targets.argmax(axis=1)).sum())

    def _observe(self, session: Session, n: int) -> None:
        for name, layer in self.layers.items():
            if layer.batch_norm:
                mean, var = (session.output(f"{name}.batch_{which}") for which in ("mean", "var"))
                layer.observe(mean, var, n * self._graph.pixels[name])

    def update(self) -> None:
        """The second half: new parameters from the gradients, and the weights that they make."""
        factor = rate_factor(self.count, self.steps, self.settings.warmup)
        if self._graph.halved:
            self._require_finite()
        self.count += 1
        rates = {name: rate * factor for name, rate in self.rates.items()}
        for layer in self.layers.values():
            layer.step(rates, self.count)
        for name, adam in self.head_learning.items():
            adam.step(self._head_gradients[name], rates["head"], self.count)
        if self._is_to_be_thinned:
            surplus = self._cut - self._most_cut if self._share is None else int(self._share * self._cut)
            thin(self.layers.values(), surplus)
            self._settled[:] = 1
        if self.count == self._late_step:
            self._learn_in_pack_bits()
        self._fuse_head()

    def _require_finite(self) -> None:
        """Of what the step accumulated; a score that is no number would be cut, and nobody would know."""
        for name, layer in self.layers.items():
            if not all(np.isfinite(array.sum(dtype=np.float64)) for array in (layer.dbias, layer.product)):
                raise KsmEdgeError(
                    f"gradients of {name} are not finite at step {self.count + 1}: what is in front of it is beyond "
                    "65504, which half precision does not hold. Try without --activation-bits"
                )

    def _learn_in_pack_bits(self) -> None:
        for layer in self.layers.values():
            layer.in_pack_bits = self.settings.learn_in_bits and self._is_late
            layer.fuse()

    def _fuse_head(self) -> None:
        self.run_head[:] = self.head_weight
        if self.settings.learn_in_bits and self._is_late:
            for row in self.run_head:
                row[:] = dequantize_difference(*quantize_difference(row, self.settings.head_bits))

    @property
    def _cut(self) -> int:
        """How many scores are cut now."""
        return sum(layer.cut for layer in self.layers.values())

    @property
    def _is_to_be_thinned(self) -> bool:
        """Whether this is the step for it; there is none behind it, as no more are cut from there on."""
        if self._share is None:
            return self._is_late and self._cut > self._most_cut
        return self._share > 0 and self.count == self._late_step

    @property
    def _is_late(self) -> bool:
        return self.count >= self._late_step

    @property
    def _late_step(self) -> int:
        return late_step(self.steps, self.settings.thin_at)

    @property
    def is_thinned(self) -> bool:
        """Whether no more masks are cut than a pack is to have."""
        return self._cut <= self._most_cut and (self._is_late or not self._share)

    def state(self) -> dict[str, np.ndarray]:
        """Everything that changes, by name; the arrays themselves, not copies."""
        optimizers = {f"{layer}:{n}": a for layer, x in self.layers.items() for n, a in x.learning.items()}
        optimizers |= {f"head:{name}": adam for name, adam in self.head_learning.items()}
        arrays = {"settled": self._settled}
        for name, adam in optimizers.items():
            arrays |= adam.state(name)
        for name, layer in self.layers.items():
            if layer.batch_norm:
                arrays |= {f"{name}:running_mean": layer.mean, f"{name}:running_var": layer.var}
        return arrays

    def restore(self, state: Mapping[str, np.ndarray], count: int) -> None:
        """Go on from `state` after `count` steps, bit for bit as if never interrupted."""
        for name, array in self.state().items():
            array[:] = state[name]
        self.count = count
        for layer in self.layers.values():
            layer.settled = bool(self._settled[0])
        self._learn_in_pack_bits()
        self._fuse_head()


def _first_head(settings: Settings, classes: int, features: int) -> np.ndarray:
    """(C, F). At random it is noise in the answers, which a few images do not determine enough to unlearn."""
    if settings.head_start == "zero":
        return np.zeros((classes, features), np.float32)
    rng, bound = np.random.default_rng([settings.seed, 0x4EAD]), np.sqrt(1 / features)
    return rng.uniform(-bound, bound, (classes, features)).astype(np.float32)


def learning_layers(layers: Sequence[Layer], settings: Settings) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the layers that learn, and of those that learn a mask; UsageError where none would."""
    if settings.method == "head":
        return frozenset(), frozenset()
    trained = select(settings.layers, layers)
    masked = select(settings.masked, layers) & trained if settings.method == "ksm" else frozenset[str]()
    if settings.method == "ksm" and not masked:
        raise UsageError(
            f"no layer would get a mask: {settings.masked!r} selects none of those that may change, {settings.layers!r}"
        )
    return trained, masked


def gradient_spec(bundle: Bundle, classes: int, settings: Settings, micro_batch: int) -> GradientSpec:
    """The gradient graph that these settings need."""
    trained, _ = learning_layers(bundle.layers, settings)
    per_weight = settings.method == "ksm" and settings.granularity == "element"
    part = REST if settings.views else WHOLE
    return GradientSpec(
        micro_batch,
        stages(bundle, settings)[0].input.size,
        classes,
        trained,
        settings.statistics,
        per_weight,
        own=native.operators is not None,
        # Exact to some 5e-6 where convs are to 5e-7: gradients of a batch's own statistics would make too much of that.
        tile_bytes=TILE_BYTES if settings.statistics == "frozen" else 0,
        part=part,
        half=settings.activation_bits < ACTIVATION_BITS[0],
        products=_products(settings, trained),
    )


def _products(settings: Settings, trained: Collection[str]) -> str:
    """Who is to multiply; with the batch's own statistics a run is one for all threads, and ours keep to one."""
    if settings.statistics == "batch":
        return STANDARD
    if settings.product_bits < PRODUCT_BITS[0] and native.halves() is not None:
        return HALVES
    return FLOATS if trained and native.multiplies_faster() else STANDARD


def of_size(spec: GradientSpec, size: int) -> GradientSpec:
    """The same for images of so many pixels, reading and adding to the same arrays."""
    return spec if size == spec.size else replace(spec, size=size, formed_at=spec.formed_at or spec.size)


def forward_spec(spec: GradientSpec, forms: Mapping[str, str], size: int | None = None) -> GradientSpec:
    """The forward pass of a graph, reading the same parameters, with the statistics that a pack brings along.

    `forms`: of the graph's layers. `size`: pixels of its images, where they are others.
    """
    # Forward `fast` is about tiles alone, so one graph serves both; but weights that are made inside are stems' too.
    tile_bytes = spec.tile_bytes if "winograd" in forms.values() else 0
    exact = replace(
        of_size(spec, size or spec.size), half=False, products=STANDARD if spec.products == HALVES else spec.products
    )
    read = replace(exact, fast=spec.fast or not spec.inside, tile_bytes=tile_bytes)
    return replace(read, backward=False, statistics="frozen", classes=0, recompute=False, part=WHOLE)


def front_spec(spec: GradientSpec) -> GradientSpec:
    """What makes the images of the rest: forward, and without parameters."""
    return replace(forward_spec(spec, {}), part=FRONT, products=spec.products)
