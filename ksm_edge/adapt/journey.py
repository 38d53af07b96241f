"""Adapting a backbone to a task, from a folder of images to a task pack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ksm_edge.adapt.descent import read_parent
from ksm_edge.adapt.job import Job, Timing
from ksm_edge.adapt.observer import Observer
from ksm_edge.atomic import require_writable
from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.cache import ImageCache
from ksm_edge.data.image_set import ImageSet, Item
from ksm_edge.data.split import stratified_split
from ksm_edge.errors import BudgetError, DataError, KsmEdgeError, UsageError
from ksm_edge.pack.files import save_pack
from ksm_edge.pack.reader import decode
from ksm_edge.resident import give_back, use_compact_heap
from ksm_edge.training.checkpoint import read_identity
from ksm_edge.training.packing import finished
from ksm_edge.training.planner import make_plan
from ksm_edge.training.settings import Settings, usual_epochs
from ksm_edge.training.start import start_from

CACHE_BYTES = 512 * 2**20  # on disk
# Larger than evaluation needs, so that a crop of half the area still fills the input.
CACHE_MARGIN = 1.25


@dataclass(frozen=True)
class Adapted:
    """A finished adaptation."""

    pack_path: Path
    pack_bytes: int
    validation_accuracy: float | None  # fraction, of the pack as it was at `judged_epoch`; None without a split
    judged_epoch: int | None  # from 1: the pack's own, or the last before held-out images were learned from as well
    best_epoch: int  # the pack's
    parent_may_have_seen: bool  # of what was held out, see `Descent.may_have_seen`
    steps: int
    epochs: int
    threads: int  # those it was begun with, where it was gone on from a checkpoint
    plan: dict[str, Any]  # `Plan.choices`
    timing: Timing
    skipped: list[tuple[str, str]]  # images that could not be read, with the reason
    history: list[dict[str, float]]  # a record of each epoch, with its validation accuracy if judged


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """The user stopped it; the file `checkpoint` holds everything."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"interrupted; {checkpoint} holds everything")
        self.checkpoint = checkpoint


def checkpoint_path(out: Path) -> Path:
    """Beside the pack that is being made."""
    return Path(f"{out}.checkpoint")


def adapt(
    bundle: Bundle,
    images: ImageSet,
    out: Path,
    settings: Settings | None = None,
    *,
    threads: int = 1,
    budget_bytes: int | None = None,
    runtime: str = "onnxruntime",
    tune: bool = False,
    resume: bool = False,
    fresh: bool = False,
    observer: Observer | None = None,
    provenance: Mapping[str, Any] | None = None,
    parent: Path | None = None,
) -> Adapted:
    """Learn the task that `images` shows and write its pack to `out`.

    `budget_bytes` bounds the resident memory that is expected, that of a process that compiles included. `runtime` is
    one of `ENGINES`: onnxruntime, or pytorch or cuda, which know no budget. `tune` measures first which forms of the
    computation are the fastest here, once for all trainings like this one. `provenance` goes into the pack's record.
    `parent` is a pack to go on from: with more images of its classes, or of others as well.
    Interrupted (Ctrl-C) leaves a checkpoint beside `out`, from which `resume` goes on, bit for bit. `fresh`: where
    one is there, begin anew all the same; it is lost with the first one of the new training.
    Raises UsageError where one is there and neither is asked for; DataError, BudgetError, UnsupportedError.
    """
    out = Path(out)
    require_writable(out)
    checkpoint = checkpoint_path(out)
    if checkpoint.exists() and not (resume or fresh):
        raise UsageError(
            f"{checkpoint} of an interrupted training is there. Go on with it by --resume, or begin anew by --fresh, "
            "which loses it"
        )
    with prepared(
        bundle,
        images,
        checkpoint,
        settings or Settings(epochs=usual_epochs(len(images.train))),
        threads=threads,
        budget_bytes=budget_bytes,
        runtime=runtime,
        tune=tune,
        resume=resume,
        observer=observer,
        parent=parent,
    ) as job:
        try:
            job.run()
            return _finish(job, out, provenance or {})
        except KeyboardInterrupt:
            _save_interrupted(job)
            raise Interrupted(checkpoint) from None
        except (OSError, DataError, BudgetError):  # a full disk, a lost image, a GPU's memory: nothing learned is lost
            if job.progress.steps_done:
                job.save_if_possible()
            raise


@contextmanager
def prepared(
    bundle: Bundle,
    images: ImageSet,
    checkpoint: Path,
    settings: Settings,
    *,
    threads: int = 1,
    budget_bytes: int | None = None,
    runtime: str = "onnxruntime",
    tune: bool = False,
    resume: bool = False,
    observer: Observer | None = None,
    parent: Path | None = None,
) -> Iterator[Job]:
    """The job of learning that task, ready to run: images read and split, memory planned, gone on from `checkpoint`.

    Raises DataError, BudgetError, UnsupportedError.
    """
    use_compact_heap()
    _require_text(images.name, *images.classes)
    observer = observer or Observer()
    before = read_identity(checkpoint) if resume else {}
    descent, parent_data = (None, b"") if parent is None else read_parent(parent, images.classes)
    if descent is not None:
        settings = descent.settings(settings)
    with ImageCache(images, int(bundle.input.resize * CACHE_MARGIN), CACHE_BYTES) as cache:
        items, skipped = cache.prepare(images.train, observer.reading)
        _require_every_class(images, items, skipped)
        train, held_out = stratified_split([item.label for item in items], settings.validation, settings.seed)
        settings = replace(settings, batch=min(settings.batch, len(train)))
        plan = make_plan(
            bundle,
            len(images.classes),
            settings,
            threads=before.get("threads", threads),
            budget_bytes=budget_bytes,
            before=before.get("plan"),
            runtime=runtime,
            tune=tune,
        )
        learned_from, judged_on = ([items[i] for i in part] for part in (train, held_out))
        job = Job(bundle, images, cache, learned_from, judged_on, skipped, plan, checkpoint, observer, descent)
        with closing(job):
            if resume:
                job.restore()
            elif descent is not None:
                # Its masks are not to be there while graphs are compiled, nor while the child learns.
                start_from(job.trainer, decode(parent_data), images.classes)
                give_back()
            del parent_data
            observer.plan(plan, len(train), len(held_out), skipped, job.trainer.steps, job.progress.steps_done)
            yield job


def _finish(job: Job, out: Path, provenance: Mapping[str, Any]) -> Adapted:
    progress = job.progress
    assert job.best is not None  # the last epoch is thinned and judged: if none before, it left one
    best = decode(job.best)
    record = {
        "data_digest": job.images.digest(),
        "images": len(job.train) + len(job.held_out),
        "validation_images": len(job.held_out),
        "validation_accuracy": progress.best_accuracy,
        "judged_epoch": progress.judged_epoch,
        "epoch": progress.best_epoch,
        "steps": progress.steps_done,
        "settings": asdict(job.settings),
        "amplify": bool(job.trainer.settings.amplify),  # where that was left to the backbone and the task
        "calibration": job.calibration(best).as_record(),
        **({} if job.descent is None else {"parent": job.descent.as_record()}),
        **provenance,
    }
    pack = finished(best, job.bundle, job.judge, record)
    size = save_pack(pack, out, **job.settings.pack_bits)
    job.checkpoint.unlink(missing_ok=True)
    return Adapted(
        pack_path=out,
        pack_bytes=size,
        validation_accuracy=progress.best_accuracy,
        judged_epoch=progress.judged_epoch,
        best_epoch=progress.best_epoch,
        parent_may_have_seen=job.descent is not None and job.descent.may_have_seen,
        steps=progress.steps_done,
        epochs=job.settings.epochs,
        threads=job.plan.engine.threads,
        plan=job.plan.choices,
        timing=job.timing,
        skipped=job.skipped,
        history=progress.history,
    )


def _save_interrupted(job: Job) -> None:
    """The checkpoint; KsmEdgeError where it cannot be written."""
    try:
        job.save()
    except OSError as error:
        earlier = "an earlier one is there" if job.checkpoint.exists() else "what was learned is lost"
        raise KsmEdgeError(
            f"interrupted, and {job.checkpoint} could not be written: {error.strerror or error}; {earlier}"
        ) from error


def _require_text(*names: str) -> None:
    """DataError for a name that no pack can hold: a file system takes any bytes."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"the name {name!r} is not UTF-8, as names in a pack are; give it another one") from None


def _require_every_class(images: ImageSet, items: list[Item], skipped: list[tuple[str, str]]) -> None:
    left = {item.label for item in items}
    for label, name in enumerate(images.classes):
        if label not in left:
            source, reason = next((s for s in skipped if f"/{name}/" in f"/{s[0]}"), ("", "no images"))
            raise DataError(f"{images.name}: no image of class {name!r} can be read ({source}: {reason})")
