"""From a memory budget to a plan: how many images run at once, and what all of it is expected to take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ksm_edge import native
from ksm_edge.autodiff.spec import FEW_CHANNELS, FEW_COLUMNS, FLOATS, HALVES, STANDARD, GradientSpec
from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import BudgetError, UsageError
from ksm_edge.resident import rss_bytes
from ksm_edge.runtimes import trial
from ksm_edge.runtimes.compile import CompiledGraph, compiled
from ksm_edge.runtimes.engine import Engine
from ksm_edge.training.footprint import activation_bytes, expected_peak_bytes, score_count
from ksm_edge.training.refusal import over_budget, require_compiling
from ksm_edge.training.settings import ACTIVATION_BITS, MOMENT_BITS, PRODUCT_BITS, Settings
from ksm_edge.training.stages import Stage, stages
from ksm_edge.training.trainer import forward_spec, front_spec, gradient_spec, learning_layers, of_size
from ksm_edge.training.tuning import Tuned, forms_that_may_differ, measured

# Micro-batches until a run's activations take this much: small networks spend their time in the calls otherwise.
COMFORTABLE_BYTES = 16 * 2**20
# With a single worker this much, as one image of 224 pixels takes in MobileNetV2: of small images products have few
# columns for all the weights they read. Of 96 pixels four at a time take 0.93 of what two do (one AMD Zen 4 core). Two
# workers of the embedded backbone took as long with twice the images, and 21 MiB more.
COMFORTABLE_ALONE_BYTES = 20 * 2**20
# Products in half precision gain by more images, for which weights are rounded once: behind the first third of
# MobileNetV2 at 224 pixels two at a time take 0.84 of the time, where float32 takes 0.98 (one AMD Zen 4 core).
COMFORTABLE_HALF_BYTES = 24 * 2**20
# Of a step's images: more gain nothing on the GPU of a Jetson, and take gigabytes.
IMAGES_ON_A_GPU = 32

Form = Mapping[str, Any]  # of `GradientSpec` what decides how things are computed, not what

# Ways to compute, from the fastest on. With moments in few bits the same again: that takes little time, but changes
# more than last bits, and comes when nothing else is left. Activations in few bits hardly ever take less than computing
# them again does, and are left to those who want the time.
FORMS: tuple[Form, ...] = tuple(
    {"fast": fast, "inside": inside, "recompute": recompute}
    for fast, inside, recompute in (
        (True, False, False),
        (False, False, False),
        (True, False, True),
        (False, False, True),
        (False, True, False),
        (False, True, True),
    )
)
# What of a form changes last bits: a training keeps to it.
CHOSEN = ("fast", "inside", "own", "widened", "tile_bytes", "products")

Candidate = tuple[Settings, int, CompiledGraph]  # settings, workers, graph


@dataclass(frozen=True, eq=False)
class PlannedStage:
    """What the epochs of a stage run by."""

    stage: Stage
    graph: CompiledGraph
    front: CompiledGraph | None  # with kept views, what lies in front of `graph`


@dataclass(frozen=True)
class Plan:
    """What was decided, and what it costs."""

    batch: int  # images in an optimizer step
    micro_batch: int  # images in one run of the gradient graph
    engine: Engine
    activation_bytes: int | None  # of all runs at once; None where nobody knows before
    expected_peak_bytes: int | None  # resident, with a process that compiles; likewise
    settings: Settings  # as asked for, but for what a short budget made of them
    stages: tuple[PlannedStage, ...]
    forward: CompiledGraph  # the forward pass in whole images, for validation
    tuned: Tuned | None = None  # where forms were measured
    distrusted: trial.Trial | None = None  # where operators of this project were left out for what came of it

    @property
    def graph(self) -> CompiledGraph:
        """That of the first epochs, by which the layers' forms were chosen."""
        return self.stages[0].graph

    @property
    def choices(self) -> dict[str, Any]:
        """What changes the result, if in its last bits alone, beside the settings: to be gone on with."""
        spec = self.graph.spec
        return {
            "micro_batch": self.micro_batch,
            "runtime": self.engine.runtime,
            "workers": self.engine.workers,
            **{name: getattr(spec, name) for name in CHOSEN},
            "moment_bits": self.settings.moment_bits,
        }


def make_plan(
    bundle: Bundle,
    classes: int,
    settings: Settings,
    *,
    threads: int,
    budget_bytes: int | None,
    before: Mapping[str, Any] | None = None,
    runtime: str = "onnxruntime",
    tune: bool = False,
) -> Plan:
    """The plan for these settings, within the budget if there is one: the fastest that fits.

    `before`: the `choices` of a training to be gone on with, as others would change what it learns. `tune`: which forms
    are the fastest is measured on this machine, see `tuning`. Raises BudgetError, naming the smallest budget that would
    do, or what compiling takes where there is no room to find that out, before anything is started; UsageError for a
    budget where `runtime` cannot promise one, and UnsupportedError where it cannot run here.
    """
    engine = Engine(runtime, threads)
    engine.check()
    if before is not None:
        _require_as_before(before, engine)
    if settings.views:
        _require_front(bundle, settings, engine)
    if not engine.plans_memory:
        _require_no_plan_needed(settings, budget_bytes, runtime, tune=tune)
        return _unmeasured_plan(bundle, classes, settings, engine)

    search = _Search(bundle, classes, settings, threads, budget_bytes, goes_on=before is not None)
    smallest = before["micro_batch"] if before else 1 if settings.statistics == "frozen" else settings.batch
    kind, workers, graph = search.first(_candidates(bundle, settings, threads, smallest, before), smallest)
    found = None
    if before is None and graph.spec.fast and not graph.spec.recompute:
        if settings.statistics == "frozen":
            graph = search.with_more_images(kind, workers, graph)
        if tune:
            found, graph = search.fastest(kind, replace(engine, workers=workers), graph)
    need, planned = search.peak((kind, workers, graph)), _stages(bundle, settings, graph)
    largest = max((each.graph for each in planned), key=activation_bytes)
    if budget_bytes is not None and need > budget_bytes:
        over = over_budget(bundle, settings, largest, workers, need, budget_bytes, goes_on=before is not None)
        raise BudgetError(over, need)
    return Plan(
        batch=settings.batch,
        micro_batch=graph.spec.micro_batch,
        engine=replace(engine, workers=workers),
        activation_bytes=activation_bytes(largest, workers),
        expected_peak_bytes=need,
        settings=kind,
        stages=planned,
        forward=_forward(bundle, graph),
        tuned=found,
        distrusted=_distrusted(gradient_spec(bundle, classes, kind, graph.spec.micro_batch)),
    )


@dataclass(frozen=True)
class _Search:
    """For the graph that a plan is made of."""

    bundle: Bundle
    classes: int
    settings: Settings
    threads: int
    budget_bytes: int | None
    goes_on: bool  # with a training that was begun before

    def graph(self, kind: Settings, workers: int, images: int, form: Form) -> CompiledGraph:
        spec = gradient_spec(self.bundle, self.classes, kind, images)
        if spec.products == FLOATS and workers < self.threads:
            spec = replace(spec, products=STANDARD)  # which are shared out to threads, where ours keep to one
        spec = replace(spec, **form)
        if self.budget_bytes is not None:
            require_compiling(self.bundle, self.settings, spec, self.budget_bytes)
        found = trial.trusted(spec)
        if self.goes_on and found != spec:
            raise UsageError(
                "the training was begun with operators in C, and those of this installation are wrong, as "
                f"{trial.trial()}: go on where it was begun, or start anew, without --resume"
            )
        return compiled(self.bundle, found)

    def beside(self, graph: CompiledGraph) -> list[CompiledGraph]:
        """What runs when `graph` does not, and may take more: mostly it is the forward pass of the same."""
        whole, planned = self.bundle.input.size, _stages(self.bundle, self.settings, graph)
        found = [each.graph for each in planned[1:]] + [each.front for each in planned if each.front is not None]
        if self.settings.views or graph.spec.size != whole:
            found.append(_forward(self.bundle, graph))
        return found

    def peak(self, candidate: Candidate) -> int:
        return expected_peak_bytes(self.bundle, self.classes, *candidate, self.beside(candidate[-1]))

    def fits(self, candidate: Candidate, elsewhere: int = 0) -> bool:
        return self.budget_bytes is None or self.peak(candidate) + elsewhere <= self.budget_bytes

    def first(self, candidates: Iterable[tuple[Settings, int, Form]], images: int) -> Candidate:
        """The first that fits, or else the smallest."""
        smallest: Candidate | None = None
        for kind, workers, form in candidates:
            candidate = kind, workers, self.graph(kind, workers, images, form)
            if self.fits(candidate):
                return candidate
            smallest = candidate if smallest is None else min(smallest, candidate, key=self.peak)
        assert smallest is not None
        return smallest

    def with_more_images(self, kind: Settings, workers: int, single: CompiledGraph) -> CompiledGraph:
        """The graph of the largest micro-batch, a power of two, that is comfortable and within the budget."""
        one = max(activation_bytes(each.graph) for each in _stages(self.bundle, self.settings, single))
        count = _most_images(one, self.settings.batch // workers, _comfortable_bytes(single.spec, workers))
        while count > 1:
            # Several images may take more than their number says: ONNX Runtime's products have them transposed.
            graph = self.graph(kind, workers, count, FORMS[0])
            if self.fits((kind, workers, graph)):
                return graph
            count //= 2
        return single

    def fastest(self, kind: Settings, engine: Engine, usual: CompiledGraph) -> tuple[Tuned, CompiledGraph]:
        """What was measured of the usual graph and of those in other forms, and the fastest; of those that fit."""
        images, here = usual.spec.micro_batch, rss_bytes()  # of this process, while another one measures
        forms = forms_that_may_differ(usual)
        graphs = {name: self.graph(kind, engine.workers, images, {**FORMS[0], **form}) for name, form in forms.items()}
        fitting = {name: graph for name, graph in graphs.items() if self.fits((kind, engine.workers, graph), here)}
        found = measured(self.bundle, kind, engine, fitting)
        return found, graphs[found.name]


def _distrusted(asked: GradientSpec) -> trial.Trial | None:
    """The trial of this project's operators, if not all that is asked for passed it; a training that goes on without
    any may not know of one.
    """
    return None if trial.trusted_if_known(asked) in (None, asked) else trial.known()


def _stages(bundle: Bundle, settings: Settings, graph: CompiledGraph) -> tuple[PlannedStage, ...]:
    """`graph`: of the first."""
    found = []
    for stage in stages(bundle, settings):
        spec = of_size(graph.spec, stage.input.size)
        front = _comfortable(bundle, front_spec(spec)) if stage.views else None
        found.append(PlannedStage(stage, graph if spec == graph.spec else compiled(bundle, spec), front))
    return tuple(found)


def _forward(bundle: Bundle, graph: CompiledGraph) -> CompiledGraph:
    """The forward pass of `graph` in whole images."""
    return _comfortable(bundle, forward_spec(graph.spec, graph.forms, bundle.input.size))


def _comfortable(bundle: Bundle, spec: GradientSpec) -> CompiledGraph:
    """For as many images at a time as are comfortable, of those that a gradient graph has."""
    graph = compiled(bundle, spec)
    if (taken := activation_bytes(graph)) <= COMFORTABLE_BYTES:
        return graph
    count = _most_images(taken // spec.micro_batch, spec.micro_batch, COMFORTABLE_BYTES)
    return compiled(bundle, replace(spec, micro_batch=count))


def _comfortable_bytes(spec: GradientSpec, workers: int) -> int:
    """Of the activations of one run, to learn by."""
    if spec.products == HALVES:
        return COMFORTABLE_HALF_BYTES
    return COMFORTABLE_ALONE_BYTES if workers == 1 else COMFORTABLE_BYTES


def _most_images(one: int, most: int, comfortable: int) -> int:
    """A power of two; `one`: bytes of activations."""
    count = 1
    while count * 2 <= most and one * count * 2 <= comfortable:
        count *= 2
    return count


def _require_no_plan_needed(settings: Settings, budget_bytes: int | None, runtime: str, *, tune: bool) -> None:
    """UsageError for what a runtime that is not planned for would pass over in silence."""
    if budget_bytes is not None:
        raise UsageError(f"the runtime {runtime} keeps no memory budget: leave it out")
    if tune:
        raise UsageError(f"the runtime {runtime} has no forms to choose from: leave out --tune")
    if settings.activation_bits < ACTIVATION_BITS[0]:
        raise UsageError(f"the runtime {runtime} keeps activations as it likes: leave out --activation-bits")
    if settings.product_bits < PRODUCT_BITS[0]:
        raise UsageError(f"the runtime {runtime} multiplies as it likes: leave out --product-bits")


def _require_as_before(before: Mapping[str, Any], engine: Engine) -> None:
    """UsageError where a training cannot be gone on with as it was begun."""
    if before["runtime"] != engine.runtime:
        raise UsageError(f"the training was begun with --runtime {before['runtime']}: go on with that")
    if before["own"] and native.operators is None:
        raise UsageError(
            "the training was begun with operators in C, which this installation lacks: install the package where "
            "there is a C compiler, or start anew, without --resume"
        )
    if before["products"] == HALVES and native.halves() is None:
        raise UsageError(
            "the training was begun with products in half precision, for which this processor has no instruction: go "
            "on where it was begun, or start anew, without --resume"
        )


def _candidates(
    bundle: Bundle, settings: Settings, threads: int, smallest: int, before: Mapping[str, Any] | None
) -> list[tuple[Settings, int, Form]]:
    """Settings, workers and forms that there are to choose from, the fastest first."""
    counts = _worker_counts(threads, settings.batch // smallest) if before is None else [before["workers"]]
    found = [
        (replace(settings, moment_bits=bits), workers, form)
        for bits, workers, form in product(_moment_bits(bundle, settings), counts, _forms(bundle, settings, before))
        # Where less is kept, how the arena places it decides, up to 17 MiB a worker.
        if workers == 1 or not (form["recompute"] or form["inside"])
        if before is None or bits == before["moment_bits"]
    ]
    if not found:  # nothing else can be asked for in so many words
        raise UsageError("the training was begun with moments of more bits: leave out --moment-bits")
    return found


def _require_front(bundle: Bundle, settings: Settings, engine: Engine) -> None:
    """UsageError where there is nothing that views could be kept of."""
    if not engine.plans_memory:
        raise UsageError(f"{engine} sees every image anew: leave out --views and --fast, or --runtime")
    if bundle.layers[0].name in learning_layers(bundle.layers, settings)[0]:
        raise UsageError(
            "--views keeps what the layers in front of those that learn make of an image, and here the first one "
            "learns: give --layers NAME.. to leave some out, or leave out --views and --fast"
        )


def _unmeasured_plan(bundle: Bundle, classes: int, settings: Settings, engine: Engine) -> Plan:
    """That of an engine which takes what memory it wants: as many images at a time as keep a GPU busy."""
    images = settings.batch if settings.statistics == "batch" else min(settings.batch, IMAGES_ON_A_GPU)
    spec = replace(gradient_spec(bundle, classes, settings, images), fast=False, own=False)  # for autograd
    graph = compiled(bundle, spec)
    return Plan(
        batch=settings.batch,
        micro_batch=images,
        engine=engine,
        activation_bytes=None,
        expected_peak_bytes=None,
        settings=settings,
        stages=_stages(bundle, settings, graph),
        forward=compiled(bundle, forward_spec(spec, graph.forms, bundle.input.size)),
    )


def _worker_counts(threads: int, runs: int) -> Sequence[int]:
    """How many of a step's runs there may be at once, from the most on."""
    return range(min(threads, runs), 0, -1)


def _moment_bits(bundle: Bundle, settings: Settings) -> Sequence[int]:
    """From the most on, where there is anything to have moments."""
    found = [bits for bits in MOMENT_BITS if bits <= settings.moment_bits]
    return found if score_count(bundle, settings) else found[:1]


def _forms(bundle: Bundle, settings: Settings, before: Mapping[str, Any] | None) -> Sequence[Form]:
    """Those of FORMS that differ: of 1x1 and depthwise layers, and of small stems, there is one alone.

    `before`: those in which a training that was begun with these choices is gone on with, to the last bit.
    """
    if before is not None:
        chosen = {name: before[name] for name in CHOSEN}
        return [form | chosen for form in map(dict, FORMS) if form.items() <= (form | chosen).items()]
    trained, _ = learning_layers(bundle.layers, settings)
    shapes = [layer.weight_shape for layer in bundle.layers if layer.name in trained and layer.groups == 1]
    inside = settings.granularity != "element" and any(I > FEW_CHANNELS and kh * kw > 1 for _, I, kh, kw in shapes)
    fast = any(kh * kw > 1 and I * kh * kw > FEW_COLUMNS for _, I, kh, kw in shapes)
    return [form for form in FORMS if (inside or not form["inside"]) and (fast or form["fast"])]
