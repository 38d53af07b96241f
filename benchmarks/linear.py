"""Classifier only: logistic regression on the features of the frozen backbone, each image's computed once.

    python benchmarks/linear.py DATA --bundle BUNDLE

Prints one JSON object. Images and split are those of `ksm-edge adapt`; how much the weights are held back is chosen on
the same validation split, then all images are fitted, and the test set is read once, at the end. `accuracy.py` runs
this.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import measure  # noqa: F401  # puts this checkout first on the path
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ksm_edge.app.images import as_input
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.data.image_set import ImageSet, Item, open_image_set
from ksm_edge.data.split import stratified_split
from ksm_edge.fuse import fuse
from ksm_edge.resident import peak_rss_bytes
from ksm_edge.runtimes.onnxruntime import Session
from ksm_edge.training.settings import Settings

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C: the inverse of the penalty
BATCH = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="folder or zip, as for `ksm-edge adapt`")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    for unused in ("--epochs", "--batch"):  # every method is given them
        parser.add_argument(unused, help=argparse.SUPPRESS)
    options = parser.parse_args()
    began = time.perf_counter()
    bundle, images = load_bundle(options.bundle), open_image_set(options.data)
    session = Session(bundle.graph_path, fuse(bundle, None))
    features, labels = _features(session, bundle, images, images.train)
    train, held_out = stratified_split(list(labels), Settings().validation, options.seed)
    fitted = {C: _fit(C, features[train], labels[train]) for C in STRENGTHS}
    validation = {C: float(model.score(features[held_out], labels[held_out])) for C, model in fitted.items()}
    chosen = max(STRENGTHS, key=lambda C: validation[C])
    model = _fit(chosen, features, labels)
    seconds, peak = time.perf_counter() - began, peak_rss_bytes()
    test, expected = _features(session, bundle, images, images.test)
    report = {
        "test_accuracy": float(model.score(test, expected)),
        "test_images": len(expected),
        "validation_accuracy": validation[chosen],
        "rate": chosen,
        "steps": 0,
        "pack_bytes": len(images.classes) * (bundle.features + 1) * 2,  # in half precision
        "wall_seconds": seconds,
        "peak_rss_bytes": peak,
    }
    print(json.dumps(report))
    return 0


def _features(
    session: Session, bundle: Bundle, images: ImageSet, items: Sequence[Item]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each image (N, F), and its label (N,)."""
    parts = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
    rows = [session.run(np.stack([as_input(images.read(item), bundle.input) for item in part])) for part in parts]
    return np.concatenate(rows), np.array([item.label for item in items])


def _fit(C: float, features: np.ndarray, labels: np.ndarray) -> object:
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000)).fit(features, labels)


if __name__ == "__main__":
    sys.exit(main())
