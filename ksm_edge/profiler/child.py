"""What one fresh process measures: a memory figure is of a process that did nothing else.

python -m ksm_edge.profiler.child WHAT OUT.json ASKED.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ksm_edge.training.planner import Plan
    from ksm_edge.training.trainer import Trainer

T = TypeVar("T")

WARM_UP = 3  # runs or steps, in which allocators and caches settle
COLD_PARTS = ("read_ms", "decode_ms", "fuse_ms", "session_ms", "first_run_ms")
STEP_PARTS = ("data_ms", "forward_ms", "gradient_ms", "update_ms")  # gradient: forward and backward


def measure_inference(bundle: str, pack: str | None, threads: int, runs: int, operators: bool) -> dict[str, Any]:
    """One cold start of one image, part by part, then `runs` more of it; with `operators` the time of each as well."""
    import onnxruntime  # noqa: F401 - it and numpy are the baseline

    from ksm_edge.bundle.golden import golden_images
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.fuse import fuse
    from ksm_edge.pack.files import require_backbone
    from ksm_edge.pack.reader import decode
    from ksm_edge.resident import peak_rss_bytes, rss_bytes, shared_bytes
    from ksm_edge.runtimes.onnxruntime import Session

    baseline, clock = rss_bytes(), _Clock()
    opened = load_bundle(Path(bundle))
    data = None if pack is None else Path(pack).read_bytes()
    clock.lap("read_ms")
    task = None if data is None else decode(data)
    if task is not None:
        require_backbone(task, opened)
    clock.lap("decode_ms")
    weights = fuse(opened, task)
    clock.lap("fuse_ms")
    session = Session(opened.graph_path, weights, threads)
    clock.lap("session_ms")
    image = golden_images(opened.input, 1)
    clock.skip()
    features = session.run(image)
    clock.lap("first_run_ms")
    for _ in range(WARM_UP):
        session.run(image)
    latency, cpu, wall = [], time.process_time(), time.perf_counter()
    for _ in range(runs):
        clock.skip()
        session.run(image)
        latency.append(clock.since())
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    if not (session.run(image) == features).all():
        raise SystemExit("the same image gave other features the second time: nothing measured here can be believed")
    found: dict[str, Any] = {
        "cold": clock.laps,
        "latency_ms": latency,
        "cpu_share": share,
        "baseline_bytes": baseline,
        "peak_rss_bytes": peak_rss_bytes(),
        **shared_bytes(),
    }
    if operators:
        found["operators_ms"] = _by_operator(opened.graph_path, weights, threads, image)
    return found


def _by_operator(graph: Path, weights: dict[str, Any], threads: int, image: Any, runs: int = 20) -> dict[str, float]:
    """Milliseconds a run that the runtime's own profiler counts for each kind of operator, the longest first."""
    from ksm_edge.runtimes.onnxruntime import Session

    with tempfile.TemporaryDirectory(prefix="ksm-edge-") as folder:
        session = Session(graph, weights, threads, profile=Path(folder, "profile"))
        for _ in range(WARM_UP + runs):
            session.run(image)
        events = json.loads(session.end_profile().read_text())
    times: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[_kind_of(event["args"])].append(event["dur"] / 1e3)
    found = {name: sum(values) / (WARM_UP + runs) for name, values in times.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _kind_of(event: dict[str, Any]) -> str:
    """The operator, and of a conv its kernel and whether each channel has one of its own."""
    if event["op_name"] != "Conv":
        return str(event["op_name"])
    image, weight, *_ = (next(iter(given.values())) for given in event["input_type_shape"])
    depthwise = " depthwise" if weight[1] == 1 < image[1] else ""
    return f"Conv {weight[2]}x{weight[3]}{depthwise}"


def measure_adaptation(
    bundle: str, batch: int, threads: int, steps: int, budget_bytes: int | None, classes: int
) -> dict[str, Any]:
    """Optimizer steps on generated photos, part by part: making the images, gradients, update; and forward alone."""
    import onnxruntime  # noqa: F401 - it and numpy are the baseline

    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.resident import peak_rss_bytes, rss_bytes, use_compact_heap
    from ksm_edge.training.planner import make_plan
    from ksm_edge.training.settings import Settings
    from ksm_edge.training.trainer import Trainer

    use_compact_heap()
    baseline, settings = rss_bytes(), Settings(batch=batch)
    opened = load_bundle(Path(bundle))
    plan = make_plan(opened, classes, settings, threads=threads, budget_bytes=budget_bytes)
    trainer = Trainer(opened, plan.graph, plan.settings, steps=1000, engine=plan.engine)
    with tempfile.TemporaryDirectory(prefix="ksm-edge-") as folder:
        write_photos(Path(folder), classes, -(-batch // classes))
        learned = _optimizer_steps(trainer, Path(folder), plan, steps)
    peak = peak_rss_bytes()
    return {
        **learned,
        # Behind the peak: the forward pass alone is a second session, which training does not have at the same time.
        "forward_ms": _forward_passes(trainer, plan, steps),
        "baseline_bytes": baseline,
        "peak_rss_bytes": peak,
        "expected_peak_bytes": plan.expected_peak_bytes,
        "activation_bytes": plan.activation_bytes,
        **plan.choices,
        "recompute": plan.graph.spec.recompute,
    }


def _optimizer_steps(trainer: Trainer, photos: Path, plan: Plan, steps: int) -> dict[str, list[float]]:
    """Milliseconds of the parts of each step behind the warm-up, and the losses of all.

    As in an adaptation images are made by a thread of their own, ahead of those who wait for them.
    """
    import numpy as np

    from ksm_edge.data.augment import Augmentation
    from ksm_edge.data.batches import training_batches
    from ksm_edge.data.cache import ImageCache
    from ksm_edge.data.image_set import open_image_set
    from ksm_edge.data.prefetch import prefetch
    from ksm_edge.training.crops import crop_scale
    from ksm_edge.training.footprint import parts_ahead
    from ksm_edge.training.targets import target_rows

    settings, contract, images = trainer.settings, trainer.bundle.input, open_image_set(photos)
    found: dict[str, list[float]] = {name: [] for name in ("data_ms", "gradient_ms", "update_ms", "losses")}
    clock = _Clock()
    with ImageCache(images, int(contract.resize * 1.25), 512 << 20) as cache:
        items = cache.prepare(images.train)[0][: settings.batch]
        labels = np.array([item.label for item in items])
        targets = target_rows(labels, len(images.classes), settings.label_smoothing, None)
        for step in range(WARM_UP + steps):
            made = training_batches(
                cache,
                items,
                contract,
                batch=settings.batch,
                seed=0,
                epoch=step,
                augmentation=Augmentation(crop_scale(settings, contract, [], 0)),
                part=plan.micro_batch,
            )
            making = _Clock()
            ahead = prefetch(_timed(made, making), depth=parts_ahead(plan.micro_batch, plan.engine.workers))
            clock.skip()
            result = trainer.accumulate((part.images for part in ahead), targets)
            found["losses"].append(result.loss)
            gradient_ms = clock.since() - result.waited_ms
            trainer.update()
            if step >= WARM_UP:
                found["update_ms"].append(clock.since())
                found["gradient_ms"].append(gradient_ms)
                found["data_ms"].append(making.total)
    return found


def _forward_passes(trainer: Trainer, plan: Plan, steps: int) -> list[float]:
    """Milliseconds of a step's forward passes alone, behind the warm-up."""
    workers = plan.engine.open(trainer.bundle, plan.forward, trainer.bound(plan.forward))
    clock, found = _Clock(), list[float]()
    runs = -(-plan.batch // plan.forward.spec.micro_batch)
    for _ in range(WARM_UP + steps):
        clock.skip()
        for _ in workers.map(lambda session, _: session.run(), range(runs)):
            pass
        found.append(clock.since())
    return found[WARM_UP:]


def _timed(parts: Iterator[T], clock: _Clock) -> Iterator[T]:
    """The same, with the time of making them added up in the clock's total."""
    while True:
        clock.skip()
        try:
            part = next(parts)
        except StopIteration:
            return
        clock.total += clock.since()
        yield part


def write_photos(folder: Path, classes: int, each: int, size: tuple[int, int] = (640, 480)) -> None:
    """JPEG files as a camera gives them, of smooth noise, in one folder a class."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class {label:03d}").mkdir()
        for index in range(each):
            coarse = rng.integers(0, 255, (24, 32, 3), np.uint8)
            photo = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            photo.save(folder / f"class {label:03d}" / f"{index}.jpg", quality=90)


class _Clock:
    """Milliseconds between one call and the next."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.total = 0.0
        self.skip()

    def skip(self) -> None:
        self._at = time.perf_counter()

    def since(self) -> float:
        now = time.perf_counter()
        passed, self._at = 1e3 * (now - self._at), now
        return passed

    def lap(self, name: str) -> None:
        self.laps[name] = self.since()


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "inference": measure_inference,
    "adaptation": measure_adaptation,
}


def main(what: str, out: str, asked: str) -> int:
    """Measure `what` as the file `asked` says, into the file `out`."""
    from ksm_edge.cores import compute_on_fast_cores

    given = json.loads(Path(asked).read_text())
    compute_on_fast_cores(given["threads"])
    try:
        found = MEASURES[what](**given)
    except KeyboardInterrupt:
        return 130
    Path(out).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
