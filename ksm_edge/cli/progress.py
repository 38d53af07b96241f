"""Progress on stderr: of an adaptation the plan, a bar and a line for each epoch that is judged; of others a bar."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from ksm_edge.adapt.observer import Observer
from ksm_edge.adapt.views import stored_bytes
from ksm_edge.autodiff.spec import HALVES
from ksm_edge.resident import peak_rss_bytes
from ksm_edge.training.checkpoint import Progress
from ksm_edge.training.planner import Plan
from ksm_edge.training.tuning import Tuned

SHOWN_SKIPS = 10

T = TypeVar("T")


class ProgressBar(Observer):
    """Draws with tqdm: images/s and time left come from it."""

    def __init__(self, replaced: Path | None = None) -> None:
        """`replaced`: a pack that the new one will take the place of."""
        self._replaced = replaced
        self._reading: tqdm[Any] | None = None
        self._seeing: tqdm[Any] | None = None
        self._bar: tqdm[Any] | None = None
        self._batch = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in (self._reading, self._seeing, self._bar):
            if bar is not None:
                bar.close()

    def reading(self, done: int, total: int) -> None:
        if self._reading is None:
            self._reading = _bar(total, "Reading images", leave=False)
        self._reading.update(done - self._reading.n)

    def plan(
        self, plan: Plan, train: int, held_out: int, skipped: list[tuple[str, str]], steps: int, done: int
    ) -> None:
        if self._reading is not None:
            self._reading.close()
        say = lambda text: print(text, file=sys.stderr)  # noqa: E731
        if skipped:
            say(f"{len(skipped)} image(s) left out, as they cannot be read:")
            for source, reason in skipped[:SHOWN_SKIPS]:
                say(f"  {source}: {reason}")
            if len(skipped) > SHOWN_SKIPS:
                say(f"  and {len(skipped) - SHOWN_SKIPS} more")
        if self._replaced is not None:
            say(f"{self._replaced} is there and will be replaced once the new pack is whole")
        at_once = f"{plan.engine.workers} x {plan.micro_batch}" if plan.engine.workers > 1 else plan.micro_batch
        settings = plan.settings
        joins = held_out > 0 and settings.held_out_until < settings.epochs
        until = f" until epoch {settings.held_out_until} or later" if joins else ""
        classes = plan.graph.spec.classes
        say(f"Images    {train} to learn from, {held_out} held out for choosing{until}, {classes} classes")
        say(f"Plan      {steps} steps of {plan.batch} images{_sizes(plan)}, {at_once} at a time{_memory(plan)}")
        if (found := plan.distrusted) is not None and not found.is_passed:
            say(
                "Operators standard ones, which take longer. This project's own, as they were compiled here, are wrong:"
            )
            say(f"          {found}. Install again with another compiler (CC=clang pip install ...)")
        if plan.tuned is not None:
            say(f"Forms     {_forms(plan.tuned)}")
        if fronts := [(each.front, each.stage.views) for each in plan.stages if each.front is not None]:
            views = " and ".join(str(count) for _, count in fronts)
            size = max(stored_bytes(front, train + held_out * joins, count) for front, count in fronts) / 2**20
            say(f"Views     {views} of each image, of which {size:.0f} MiB on disk keep what the layers in front make")
        self._batch = plan.batch
        self._bar = _bar(steps * plan.batch, "Learning", done=done * plan.batch)

    def seeing(self, done: int, total: int) -> None:
        if self._seeing is None:
            self._seeing = _bar(total, "Keeping features", leave=False)
        self._seeing.update(done - self._seeing.n)
        if done == total:
            self._seeing.close()
            self._seeing = None

    def step(self, progress: Progress, steps: int, loss: float, accuracy: float) -> None:
        assert self._bar is not None
        rss = peak_rss_bytes() / 2**20
        self._bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}, peak {rss:.0f} MiB", refresh=False)
        self._bar.update(progress.steps_done * self._batch - self._bar.n)

    def note(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def joined(self, images: int) -> None:
        tqdm.write(f"From here on {images} held-out images are learned from as well", file=sys.stderr)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        held_out = record.get("validation_accuracy")
        judged = "" if held_out is None else f", {held_out:.2%} on held-out images"
        tqdm.write(
            f"Epoch {record['epoch']}/{epochs}: loss {record['loss']:.3f}, "
            f"accuracy {record['train_accuracy']:.1%}{judged}",
            file=sys.stderr,
        )


def counted(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, one after the other, behind a bar."""
    with _bar(total, what) as bar:
        for item in items:
            yield item
            bar.update()


def _sizes(plan: Plan) -> str:
    """Of the images that are learned from, where they are not always whole."""
    first, *later = (each.stage for each in plan.stages)
    if first.input.size == plan.forward.spec.size:
        return ""
    sizes = [f" of {first.input.size} pixels"]
    sizes += [f"from epoch {stage.epochs.start + 1} on of {stage.input.size}" for stage in later]
    return ", ".join(sizes)


def _memory(plan: Plan) -> str:
    """What a short budget, or few bits, made of the plan, and what it takes."""
    if plan.expected_peak_bytes is None:
        return f", by {plan.engine}, which takes what memory it wants"
    spec = plan.graph.spec
    short = "" if spec.fast else ", in forms that take less memory"
    short += ", weights of k x k layers made when they are needed" if spec.inside else ""
    short += ", most of the forward pass computed twice" if spec.recompute else ""
    short += ", what gradients are made from in half precision" if plan.graph.halved else ""
    short += _products(plan) if plan.settings.product_bits == 16 else ""
    short += ", moments of Adam in 8 bits" if plan.settings.moment_bits == 8 else ""
    return f"{short}; expected peak memory {plan.expected_peak_bytes / 2**20:.0f} MiB"


def _products(plan: Plan) -> str:
    """What came of asking for half precision."""
    if plan.graph.spec.products == HALVES:
        return ", products in half precision"
    if plan.settings.statistics == "batch":
        return ", products in float32, as statistics are the batch's own"
    if (found := plan.distrusted) is not None:
        return f", products in float32, as others are wrong here: {found}" if found.is_passed else ""
    return ", products in float32, as none are faster here"


def _forms(tuned: Tuned) -> str:
    """What was measured, and what came of it."""
    if len(tuned.ms) == 1:
        return f"{tuned.name}: there are no others for this network and what it learns, or no memory to measure them in"
    times = ", ".join(f"{name} {ms:.0f} ms" for name, ms in tuned.ms.items())
    return f"{tuned.name}, in {tuned.share:.0%} of the usual time (a step by {times})"


def _bar(total: int, what: str, *, done: int = 0, leave: bool = True) -> tqdm[Any]:
    # Into a file or a journal, where lines pile up, four times a minute will do.
    interval = 0.1 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=total, initial=done, desc=what, unit="img", leave=leave, file=sys.stderr, smoothing=0.05,
        mininterval=interval, maxinterval=max(10.0, interval),
    )  # fmt: skip
