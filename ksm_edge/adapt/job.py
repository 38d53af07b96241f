"""One adaptation under way: epochs, validation, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ksm_edge import native
from ksm_edge.adapt.descent import Descent
from ksm_edge.adapt.interrupt import interrupt_held_back
from ksm_edge.adapt.observer import Observer
from ksm_edge.adapt.views import Views
from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.augment import Augmentation
from ksm_edge.data.batches import (
    Batch,
    evaluation_batches,
    parts_of_batches,
    training_order,
    training_views,
)
from ksm_edge.data.cache import ImageCache
from ksm_edge.data.image_set import ImageSet, Item
from ksm_edge.data.prefetch import prefetch
from ksm_edge.errors import KsmEdgeError
from ksm_edge.pack.calibration import Calibration, calibrate
from ksm_edge.pack.format import encode
from ksm_edge.pack.reader import decode
from ksm_edge.pack.record import Pack
from ksm_edge.resident import give_back
from ksm_edge.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from ksm_edge.training.choice import is_judged
from ksm_edge.training.crops import crop_scale
from ksm_edge.training.footprint import parts_ahead
from ksm_edge.training.judge import Judge
from ksm_edge.training.packing import to_pack
from ksm_edge.training.planner import Plan
from ksm_edge.training.targets import balanced_weights, target_rows
from ksm_edge.training.trainer import Trainer

CHECKPOINT_SECONDS = 180.0  # an SD card wears with every write
SHOWN_STEPS = 50  # that the loss shown is the mean of


@dataclass
class Timing:
    """Milliseconds of each optimizer step, and of waiting for its images; of this process, not of a whole run."""

    step_ms: list[float] = field(default_factory=list)
    wait_ms: list[float] = field(default_factory=list)
    images: int = 0
    views_ms: float = 0.0  # of putting views through the front, all together


class Job:
    """The training of one task: what it learns from, how far it has come, and the best pack so far."""

    def __init__(
        self,
        bundle: Bundle,
        images: ImageSet,
        cache: ImageCache,
        train: list[Item],
        held_out: list[Item],
        skipped: list[tuple[str, str]],
        plan: Plan,
        checkpoint: Path,
        observer: Observer,
        descent: Descent | None = None,
    ) -> None:
        """`cache` reads the items of `images`, of which `train` are learned from and `held_out` judge, until they join.

        `skipped`: images that could not be read, with the reason.
        """
        self.bundle, self.images, self.settings, self.plan = bundle, images, plan.settings, plan
        self.train, self.held_out, self.skipped, self.cache = train, held_out, skipped, cache
        self.items = train + held_out  # in the order that indices count in
        self.checkpoint, self.descent = checkpoint, descent
        self.progress, self.timing = Progress(), Timing()
        self.best: bytes | None = None  # pack
        self._observer, self._saved_at = observer, time.monotonic()
        self._losses: list[float] = []
        self._running = plan.stages[0]
        self.per_epoch = self._steps_of_an_epoch()
        steps = self.per_epoch * self.settings.epochs
        self.trainer = Trainer(bundle, plan.graph, self.settings, steps=steps, engine=plan.engine)
        self.judge = Judge(self.trainer, plan.forward, plan.engine)
        fronts = [(each.front, each.stage.views) for each in plan.stages if each.front is not None]
        self.views = Views(bundle, fronts, plan.engine, self._learned_by(self.settings.epochs - 1)) if fronts else None
        self._labels = np.array([item.label for item in self.items])
        learned = self._labels[: len(train)]
        self._class_weights = balanced_weights(learned, len(images.classes)) if self.settings.balanced else None

    def _steps_of_an_epoch(self) -> int:
        count, batch = len(self.train), self.plan.batch
        # With batch statistics an incomplete batch is left out: it has none worth keeping.
        return -(-count // batch) if self.settings.statistics == "frozen" else count // batch

    def _learned_by(self, epoch: int) -> int:
        """How many of the items may have been learned from when that epoch (from 0) ends."""
        return len(self.items if self.settings.held_out_until <= epoch else self.train)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be gone on from."""
        own = self.plan.graph.spec.own
        return {
            "backbone": self.bundle.digest,
            "data": self.images.digest(),
            "settings": asdict(self.settings),
            "plan": self.plan.choices,
            "threads": self.plan.engine.threads,
            # Without them, or with others, scores and gradients are the same but for their last bits.
            "compiled": {"loops": native.loops is not None, "operators": native.running() if own else None},
            "parent": None if self.descent is None else self.descent.sha256,
        }

    def restore(self) -> None:
        """Go on from the checkpoint."""
        state, self.progress, self.best = load_checkpoint(self.checkpoint, self.identity())
        self.trainer.restore(state, self.progress.steps_done)

    def close(self) -> None:
        """Give back what it holds on disk."""
        if self.views is not None:
            self.views.close()

    def save(self) -> None:
        """Write the checkpoint."""
        with interrupt_held_back():
            save_checkpoint(self.checkpoint, self.trainer.state(), self.progress, self.best, self.identity())
        self._saved_at = time.monotonic()

    def run(self) -> None:
        """All epochs that are left; raises KsmEdgeError where the loss is no longer a number."""
        try:
            while self.progress.epoch < self.settings.epochs:
                self._join_if_due()
                self._begin_stage()
                self._learn_epoch()
                self._end_epoch()
        finally:
            self.close()  # a pack or a checkpoint may need the room on disk

    def _join_if_due(self) -> None:
        """Have the held-out images join, once they have nothing more to choose: the epoch just ended is the one.

        An epoch still has as many steps, each time of other ones among all images.
        """
        progress = self.progress
        is_due = progress.epoch >= self.settings.held_out_until and progress.best_epoch == progress.epoch
        if progress.joined or not self.held_out or not is_due:
            return
        assert self.best is not None  # the chosen epoch's
        calibration = self.calibration(decode(self.best))
        give_back()
        with interrupt_held_back():
            progress.joined, progress.calibration = True, calibration.as_record()
        self._observer.joined(len(self.held_out))

    def _begin_stage(self) -> None:
        """Go on by the graphs of this epoch's stage, where it is another one than before."""
        found = next(each for each in self.plan.stages if self.progress.epoch in each.stage.epochs)
        if found is self._running:
            return
        self._running = found
        if self.views is not None and found.front is not None:
            self.views.begin(found.front)
        self.trainer.go_on_with(found.graph)

    def _learn_epoch(self) -> None:
        progress, batch = self.progress, self.plan.batch
        images = self.items if progress.joined else self.train
        order = training_order(len(images), self.settings.seed, progress.epoch, len(self.train))
        if self.views is not None and progress.step < self.per_epoch and not self.views.has(self._view):
            self._see(self.views)
        parts = prefetch(self._parts(order), depth=self._ahead(self.plan.micro_batch))
        try:
            while progress.step < self.per_epoch:
                first = progress.step * batch
                self._step(self._labels[order[first : first + batch]], parts)
                if time.monotonic() - self._saved_at > CHECKPOINT_SECONDS:
                    self.save_if_possible()
        finally:
            parts.close()

    def _parts(self, order: np.ndarray) -> Generator[Batch, None, None]:
        """What is left of this epoch, micro-batch by micro-batch."""
        step, view = self.progress.step, self._view
        for indices in parts_of_batches(order, self.plan.batch, first_step=step, part=self.plan.micro_batch):
            if self.views is None:
                yield self._seen(indices, view)
            else:
                yield Batch(self.views.features(view, indices), self._labels[indices], indices)

    def _seen(self, indices: np.ndarray, view: int) -> Batch:
        stage, progress = self._running.stage, self.progress
        scale = crop_scale(self.settings, stage.input, progress.history, stage.turn(progress.epoch))
        augmentation = Augmentation(scale, flip=self.settings.flip)
        return training_views(
            self.cache,
            self.items,
            stage.input,
            indices,
            seed=self.settings.seed,
            view=view,
            augmentation=augmentation,
        )

    @property
    def _view(self) -> int:
        """That of this epoch."""
        return self._running.stage.view(self.progress.epoch)

    def _see(self, views: Views) -> None:
        """Put this epoch's view of every image that its stage may learn from through the front."""
        began = time.perf_counter()
        count = self._learned_by(self._running.stage.epochs[-1])
        everything = parts_of_batches(np.arange(count), views.at_once)
        ahead = self._ahead(views.at_once)
        seen = prefetch((self._seen(indices, self._view) for indices in everything), depth=ahead)
        try:
            views.fill(self._view, seen, lambda done: self._observer.seeing(done, count))
        finally:
            seen.close()
        give_back()
        self.timing.views_ms += (time.perf_counter() - began) * 1e3

    def _ahead(self, images: int) -> int:
        """How many parts, of so many images, are made before they are asked for.

        Learning from images mostly takes longer than making them, and every one that waits is memory.
        """
        return parts_ahead(images, self.plan.engine.workers)

    def _step(self, labels: np.ndarray, parts: Iterator[Batch]) -> None:
        """On as many images as there are labels, the next ones of `parts`."""
        progress, settings, classes = self.progress, self.settings, len(self.images.classes)
        targets = target_rows(labels, classes, settings.label_smoothing, self._class_weights)
        images = (next(parts).images for _ in range(0, len(labels), self.plan.micro_batch))
        # What comes behind an epoch's last step must not add to the peak.
        release = progress.step + 1 == self.per_epoch and self._something_follows
        started = time.perf_counter()
        with interrupt_held_back():
            result = self.trainer.step(images, targets, release=release)
            progress.add(result.loss, result.correct, result.count)
        self.timing.step_ms.append((time.perf_counter() - started) * 1e3 - result.waited_ms)
        self.timing.wait_ms.append(result.waited_ms)
        self.timing.images += result.count
        if not np.isfinite(result.loss):
            rates = self.trainer.rates
            raise KsmEdgeError(
                f"the loss is {result.loss} at step {progress.steps_done}: the learning rates are too high for this "
                f"task (scores {rates['score']:g}, batch-norm {rates['gamma']:g}, head {rates['head']:g})"
            )
        self._losses = [*self._losses[1 - SHOWN_STEPS :], result.loss]
        shown = float(np.mean(self._losses))
        self._observer.step(progress, self.trainer.steps, shown, progress.correct / progress.count)

    def save_if_possible(self) -> None:
        """A checkpoint that cannot be written is no reason to stop learning."""
        try:
            self.save()
        except OSError as error:
            self._saved_at = time.monotonic()
            self._observer.note(f"no checkpoint could be written to {self.checkpoint}: {error.strerror}; going on")

    @property
    def _is_shown(self) -> bool:
        """Whether whoever watches is told of this epoch when it ends."""
        return is_judged(self.progress.epoch + 1, self.settings.epochs)

    @property
    def _leaves_a_pack(self) -> bool:
        """Whether this epoch does, if it is chosen; of those that learn from every image only the last is."""
        return self._is_shown and (not self.progress.joined or self.progress.epoch + 1 == self.settings.epochs)

    @property
    def _something_follows(self) -> bool:
        """Whether this epoch's steps are followed by others than the next one's: judging, another stage, a new view."""
        if self._leaves_a_pack:
            return True
        following = self.progress.epoch + 1
        stage = self._running.stage
        return following not in stage.epochs or (self.views is not None and not self.views.has(stage.view(following)))

    def _end_epoch(self) -> None:
        """All of its steps have been done."""
        progress, is_shown = self.progress, self._is_shown
        if self._something_follows:
            give_back()
        if self._leaves_a_pack:
            self._keep_pack_if_chosen()
        else:
            with interrupt_held_back():
                progress.finish_epoch(None)
        if is_shown:
            self._observer.epoch(progress.history[-1], self.settings.epochs)

    def _keep_pack_if_chosen(self) -> None:
        """Judge the pack as it would be written, on the validation split; the one to end with is kept."""
        progress = self.progress
        pack = to_pack(self.trainer, self.images.name, self.images.classes)
        give_back()  # what coding took, before the pack's weights are looked at
        validation = self._accuracy(pack) if self.held_out and not progress.joined else None
        with interrupt_held_back():
            progress.finish_epoch(validation)
            # None that is not yet thinned: its pack would be larger than was asked for.
            if self.trainer.is_thinned and progress.choose(validation, len(self.held_out)):
                self.best = encode(pack, **self.settings.pack_bits)
        del pack  # its masks would leave gaps behind
        give_back()

    def calibration(self, pack: Pack) -> Calibration:
        """How far the pack's probabilities can be trusted, from the held-out images while they were held out."""
        if self.progress.calibration is not None:
            return Calibration(**self.progress.calibration)
        if not self.held_out:
            return Calibration()
        logits = self.judge.logits(pack, (batch.images for batch in self._held_out_batches()))
        return calibrate(logits, np.array([item.label for item in self.held_out]))

    def _accuracy(self, pack: Pack) -> float:
        return self.judge.accuracy(pack, self._held_out_batches())

    def _held_out_batches(self) -> Generator[Batch, None, None]:
        at_once = self.plan.forward.spec.micro_batch
        batches = evaluation_batches(self.cache, self.held_out, self.bundle.input, batch=at_once)
        return prefetch(batches, depth=self._ahead(at_once))
