"""How accurate a loaded task is on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ksm_edge.app.app import App
from ksm_edge.app.images import as_input
from ksm_edge.bundle.layers import InputContract
from ksm_edge.data.image_set import ImageSet, Item
from ksm_edge.errors import DataError
from ksm_edge.pack.calibration import calibration_error

BATCH = 8


def evaluate(app: App, images: ImageSet, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Accuracy of the app's current task, as fractions, on test/ or else on all images; classes are matched by name.

    `learned_from` says whether those images are the ones the task was learned from. Raises DataError where no image can
    be read, or one has a class that the pack does not know.
    """
    split, items = ("test", images.test) if images.test else ("all", images.train)
    answers: dict[str, list[bool]] = {}
    right: list[bool] = []
    confidence: list[float] = []
    calibration = app.calibration()
    skipped: list[dict[str, str]] = []
    done = 0
    for inputs, labels in _batches(images, items, app.bundle.input, skipped):
        logits, classes = app.logits(inputs)
        _require_classes(images, classes)
        probabilities = calibration.probabilities(logits)
        for label, row in zip(labels, probabilities, strict=True):
            right.append(classes[row.argmax()] == label)
            answers.setdefault(label, []).append(right[-1])
            confidence.append(float(row.max()))
        done += len(labels)
        if progress is not None:
            progress(done, len(items))
    if not answers:
        raise DataError(f"{images.name}: none of {len(items)} images can be read; {skipped[0]['reason']}")
    return {
        "split": split,
        "n": done,
        "accuracy": sum(right) / done,
        "calibration_error": calibration_error(np.array(confidence), np.array(right)),
        "threshold": calibration.threshold,
        "known": float(np.mean(np.array(confidence) >= calibration.threshold)),
        "per_class": {name: sum(given) / len(given) for name, given in sorted(answers.items())},
        "n_per_class": {name: len(given) for name, given in sorted(answers.items())},
        "skipped": skipped,
        "learned_from": split == "all" and images.digest() == app.record().get("data_digest"),
    }


def unknown_share(app: App, images: ImageSet) -> float:
    """The share of images of another task that the app's current task calls unknown: the more the better."""
    items, calibration = images.test or images.train, app.calibration()
    skipped: list[dict[str, str]] = []
    below: list[bool] = []
    for inputs, _ in _batches(images, items, app.bundle.input, skipped):
        confidence = calibration.probabilities(app.logits(inputs)[0]).max(axis=1)
        below += (confidence < calibration.threshold).tolist()
    if not below:
        raise DataError(f"{images.name}: none of {len(items)} images can be read; {skipped[0]['reason']}")
    return float(np.mean(below))


def _batches(
    images: ImageSet, items: Sequence[Item], contract: InputContract, skipped: list[dict[str, str]]
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Inputs (n, 3, S, S) and class names of the images that can be read; the others are added to `skipped`."""
    inputs: list[np.ndarray] = []
    labels: list[str] = []
    for item in items:
        try:
            inputs.append(as_input(images.read(item), contract))
            labels.append(images.classes[item.label])
        except DataError as error:
            skipped.append({"image": item.source, "reason": str(error)})
        if len(inputs) == BATCH:
            yield np.stack(inputs), labels
            inputs, labels = [], []
    if inputs:
        yield np.stack(inputs), labels


def _require_classes(images: ImageSet, classes: Sequence[str]) -> None:
    if strangers := sorted(set(images.classes) - set(classes)):
        raise DataError(
            f"{images.name} has classes that the pack does not know: {', '.join(strangers[:5])}; "
            f"the pack's are {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
        )
