"""Adapting a backbone to a task, from a folder of images to a task pack."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ksm_edge.adapt.interrupt import interrupt_held_back
from ksm_edge.adapt.observer import Observer
from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.augment import Augmentation
from ksm_edge.data.batches import evaluation_batches, training_batches
from ksm_edge.data.cache import ImageCache
from ksm_edge.data.image_set import ImageSet, Item
from ksm_edge.data.prefetch import prefetch
from ksm_edge.data.split import stratified_split
from ksm_edge.errors import DataError
from ksm_edge.pack.files import save_pack
from ksm_edge.pack.format import encode
from ksm_edge.pack.reader import decode
from ksm_edge.pack.record import Pack
from ksm_edge.resident import give_back
from ksm_edge.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from ksm_edge.training.judge import Judge
from ksm_edge.training.packing import finished, to_pack
from ksm_edge.training.planner import Plan, make_plan
from ksm_edge.training.settings import Settings
from ksm_edge.training.targets import balanced_weights, target_rows
from ksm_edge.training.trainer import Trainer

CHECKPOINT_SECONDS = 180.0  # an SD card wears with every write
CACHE_BYTES = 512 * 2**20  # on disk
# Crops down to a third of the area still fill the input when the cached image is this much larger than it.
CACHE_MARGIN = 1.25


@dataclass(frozen=True)
class Adapted:
    """A finished adaptation."""

    pack_path: Path
    pack_bytes: int
    validation_accuracy: float | None  # fraction, of the pack as written; None without a validation split
    best_epoch: int  # from 1
    steps: int
    epochs: int
    step_ms: list[float]  # per optimizer step, without waiting for data
    wait_ms: list[float]  # per optimizer step, waiting for data
    images: int  # training images seen, in all
    seconds: float  # of the training loop
    skipped: list[tuple[str, str]]  # images that could not be read, with the reason
    history: list[dict[str, float]]


@dataclass(eq=False)  # an exception must be hashable
class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """The user stopped it; the checkpoint holds everything."""

    checkpoint: Path


@dataclass
class _Job:
    """One adaptation under way."""

    bundle: Bundle
    images: ImageSet
    settings: Settings
    plan: Plan
    out: Path
    observer: Observer
    cache: ImageCache
    train: list[Item]
    held_out: list[Item]
    skipped: list[tuple[str, str]]
    progress: Progress = field(default_factory=Progress)
    best: bytes | None = None
    step_ms: list[float] = field(default_factory=list)
    wait_ms: list[float] = field(default_factory=list)
    seen: int = 0
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.per_epoch = (
            len(self.train) // self.plan.batch if self._drops_last() else -(-len(self.train) // self.plan.batch)
        )
        if not self.per_epoch:
            raise DataError(
                f"{len(self.train)} training images are fewer than one batch of {self.plan.batch}, which batch "
                f"statistics need whole: give --batch {len(self.train)} or less"
            )
        self.trainer = Trainer(
            self.bundle,
            self.plan.graph,
            self.settings,
            steps=self.per_epoch * self.settings.epochs,
            threads=self.plan.threads,
        )
        self.judge = Judge(self.trainer, self.plan.forward, self.plan.threads)
        labels = np.array([item.label for item in self.train])
        classes = len(self.images.classes)
        self.class_weights = balanced_weights(labels, classes) if self.settings.balanced else None

    def _drops_last(self) -> bool:
        """An incomplete batch has no statistics worth keeping."""
        return self.settings.statistics == "batch"

    @property
    def checkpoint_path(self) -> Path:
        return checkpoint_path(self.out)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be gone on from."""
        return {
            "backbone": self.bundle.digest,
            "data": self.images.digest(),
            "settings": asdict(self.settings),
            "micro_batch": self.plan.micro_batch,
            "threads": self.plan.threads,
        }

    def restore(self) -> None:
        state, self.progress, self.best = load_checkpoint(self.checkpoint_path, self.identity())
        self.trainer.restore(state, self.progress.steps_done)

    def save(self) -> None:
        save_checkpoint(self.checkpoint_path, self.trainer.state(), self.progress, self.best, self.identity())
        self.saved_at = time.monotonic()

    def run(self) -> None:
        while self.progress.epoch < self.settings.epochs:
            self._epoch()

    def _epoch(self) -> None:
        progress, settings = self.progress, self.settings
        batches = prefetch(
            training_batches(
                self.cache, self.train, self.bundle.input, batch=self.plan.batch, seed=settings.seed,
                epoch=progress.epoch, augmentation=Augmentation(flip=settings.flip), first_step=progress.step,
            ),
            depth=1,  # a step takes longer than its images, and two batches more would be two batches of memory
        )  # fmt: skip
        losses = []
        try:
            while progress.step < self.per_epoch:
                asked = time.perf_counter()
                batch = next(batches)
                started = time.perf_counter()
                targets = target_rows(
                    batch.labels, len(self.images.classes), settings.label_smoothing, self.class_weights
                )
                # Validation comes behind the last step, and must not add to the peak.
                release = progress.step + 1 == self.per_epoch
                with interrupt_held_back():
                    result = self.trainer.step(batch.images, targets, release=release)
                    progress.add(result.loss, result.correct, result.count)
                ended = time.perf_counter()
                self.wait_ms.append((started - asked) * 1e3)
                self.step_ms.append((ended - started) * 1e3)
                self.seen += result.count
                losses.append(result.loss)
                recent, accuracy = float(np.mean(losses[-50:])), progress.correct / progress.count
                self.observer.step(progress, self.trainer.steps, recent, accuracy)
                if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                    self.save()
        finally:
            batches.close()
        self._finish_epoch()

    def _finish_epoch(self) -> None:
        """Judge the pack as it would be written, on the validation split; the best one is kept."""
        progress = self.progress
        give_back()
        pack = to_pack(self.trainer, self.images.name, self.images.classes)
        validation = self._accuracy(pack) if self.held_out else None
        with interrupt_held_back():
            progress.finish_epoch(validation)
            # Equal accuracy: the later epoch, whose rates are lower. Without a split: the last.
            if validation is None or validation >= progress.best_accuracy:
                progress.best_accuracy = -1.0 if validation is None else validation
                progress.best_epoch, self.best = progress.epoch, encode(pack)
        give_back()
        self.observer.epoch(progress.history[-1], self.settings.epochs)

    def _accuracy(self, pack: Pack) -> float:
        size = self.plan.micro_batch
        batches = prefetch(evaluation_batches(self.cache, self.held_out, self.bundle.input, batch=size))
        return self.judge.accuracy(pack, batches)


def checkpoint_path(out: Path) -> Path:
    """Beside the pack that is being made."""
    return out.with_name(out.name + ".checkpoint")


def adapt(
    bundle: Bundle,
    images: ImageSet,
    out: Path,
    settings: Settings | None = None,
    *,
    threads: int = 1,
    budget_bytes: int | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Adapted:
    """Learn the task that `images` shows and write its pack to `out`.

    `budget_bytes` bounds the expected resident memory of the process. `provenance` goes into the pack's record.
    Interrupted (Ctrl-C) leaves a checkpoint beside `out`, from which `resume` goes on, bit for bit.
    Raises DataError, BudgetError, UnsupportedError.
    """
    settings, observer = settings or Settings(), observer or Observer()
    out = Path(out)
    if not out.parent.is_dir():
        raise DataError(f"there is no folder {out.parent} to write {out.name} into; make it first")
    if out.is_dir():
        raise DataError(f"{out} is a folder; give the name of the pack to write")
    with ImageCache(images, int(bundle.input.resize * CACHE_MARGIN), CACHE_BYTES) as cache:
        items, skipped = cache.prepare(images.train, observer.reading)
        _require_every_class(images, items, skipped)
        train, held_out = stratified_split([item.label for item in items], settings.validation, settings.seed)
        settings = replace(settings, batch=min(settings.batch, len(train)))
        plan = make_plan(bundle, len(images.classes), settings, threads=threads, budget_bytes=budget_bytes)
        job = _Job(
            bundle, images, settings, plan, out, observer, cache,
            [items[i] for i in train], [items[i] for i in held_out], skipped,
        )  # fmt: skip
        if resume:
            job.restore()
        observer.plan(plan, len(train), len(held_out), skipped, job.trainer.steps)
        started = time.perf_counter()
        try:
            job.run()
            return _finish(job, time.perf_counter() - started, provenance or {})
        except KeyboardInterrupt:
            job.save()
            raise Interrupted(job.checkpoint_path) from None


def _finish(job: _Job, seconds: float, provenance: Mapping[str, Any]) -> Adapted:
    progress = job.progress
    assert job.best is not None
    accuracy = progress.best_accuracy if job.held_out else None
    record = {
        "data_digest": job.images.digest(),
        "images": len(job.train) + len(job.held_out),
        "validation_images": len(job.held_out),
        "validation_accuracy": accuracy,
        "epoch": progress.best_epoch,
        "steps": progress.steps_done,
        "settings": asdict(job.settings),
        **provenance,
    }
    pack = finished(decode(job.best), job.bundle, job.judge, record)
    size = save_pack(pack, job.out)
    job.checkpoint_path.unlink(missing_ok=True)
    return Adapted(
        job.out, size, accuracy, progress.best_epoch, progress.steps_done, job.settings.epochs,
        job.step_ms, job.wait_ms, job.seen, seconds, job.skipped, progress.history,
    )  # fmt: skip


def _require_every_class(images: ImageSet, items: list[Item], skipped: list[tuple[str, str]]) -> None:
    left = {item.label for item in items}
    for label, name in enumerate(images.classes):
        if label not in left:
            source, reason = next((s for s in skipped if f"/{name}/" in f"/{s[0]}"), ("", "no images"))
            raise DataError(f"{images.name}: no image of class {name!r} can be read ({source}: {reason})")
