"""The plain backbone run on its golden images: what a bundle must answer when no pack is in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ksm_edge.bundle import manifest
from ksm_edge.bundle.golden import TOLERANCE, golden_images, read_golden, relative_error
from ksm_edge.bundle.layers import Bundle, InputContract, Layer, LayerWeights
from ksm_edge.errors import DamagedFileError, KsmEdgeError, UnsupportedError


def plain_weights(layers: Iterable[Layer], weights: Mapping[str, LayerWeights]) -> dict[str, np.ndarray]:
    """Each layer's weight and bias with its batch-norm folded in, as `LAYER.weight` and `LAYER.bias`, float32.

    What `ksm_edge.fuse` gives for no pack. It is written again here because a bundle lies below fusing.
    """
    folded = {}
    for layer in layers:
        held = weights[layer.name]
        factor = held.gamma / np.sqrt(held.var + np.float32(layer.eps))
        folded[f"{layer.name}.weight"] = held.weight * factor[:, None, None, None]
        folded[f"{layer.name}.bias"] = held.beta + (held.bias - held.mean) * factor
    return folded


def plain_features(graph: Path | bytes, folded: Mapping[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """Features (N, F) float32 of images (N, 3, H, W), by ONNX Runtime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns of each initializer that is given twice
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in folded.values()]
    options.add_external_initializers(list(folded), values)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(["features"], {"image": images})[0]


def golden_features(
    graph: Path | bytes, layers: Iterable[Layer], weights: Mapping[str, LayerWeights], contract: InputContract
) -> np.ndarray:
    """Features of the golden images, (n, F) float32.

    Raises UnsupportedError where ONNX Runtime does not run the network, KsmEdgeError where they are not finite numbers.
    """
    folded = plain_weights(layers, weights)
    try:
        features = plain_features(graph, folded, golden_images(contract))
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # those of ONNX Runtime share no other base class
        raise UnsupportedError(
            f"ONNX Runtime does not run this network in images of {contract.size} pixels: {error}"
        ) from error
    if not np.isfinite(features).all():
        raise KsmEdgeError("the backbone's features are not finite on its golden images; are its weights trained ones?")
    return features


def check_golden(bundle: Bundle) -> float:
    """Run a bundle on its golden images; the error against the features in its manifest, relative to the largest.

    Raises DamagedFileError above 1e-4: the processor, the runtime or the bundle computes something else.
    """
    stored = read_golden(manifest.read_manifest(bundle.path / manifest.NAME)["golden"])
    found = golden_features(bundle.graph_path, bundle.layers, bundle.weights, bundle.input)
    error = relative_error(found, stored)
    if not error <= TOLERANCE:
        raise DamagedFileError(
            f"{bundle.path}: its features on the golden images differ by {error:.1e} from those it was exported with "
            f"(at most {TOLERANCE:.0e}); export it again, or try another release of onnxruntime"
        )
    return error
