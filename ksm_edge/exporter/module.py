"""Export any torch module as a bundle, through a Python call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ksm_edge.bundle.freeze import Frozen, freeze
from ksm_edge.bundle.golden import TOLERANCE, golden_images, relative_error
from ksm_edge.bundle.layers import Bundle, InputContract
from ksm_edge.bundle.make import UNKNOWN_LICENCE, save_bundle
from ksm_edge.bundle.plain import golden_features
from ksm_edge.errors import KsmEdgeError, UsageError
from ksm_edge.exporter.pth import to_numpy
from ksm_edge.exporter.weightless import weightless_graph


def export_module(
    module: torch.nn.Module,
    path: Path | str,
    input_contract: InputContract,
    *,
    features: str | None = None,
    licence: str = UNKNOWN_LICENCE,
    overwrite: bool = False,
) -> Bundle:
    """Freeze a classifier or extractor, image (N, 3, H, W) -> anything, and write it as a bundle.

    features: the submodule whose output is the features (their mean over the pixels where it is a map); by default
    they are what the first Linear layer takes. The bundle is compared with the module itself.
    Raises UnsupportedError naming the node for what a frozen graph cannot hold, UsageError for an unknown submodule,
    KsmEdgeError where bundle and module disagree by more than 1e-4 of the largest feature.

    >>> export_module(net, "net.bundle", InputContract(96, 110, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))  # doctest: +SKIP
    """
    if features is not None and features not in dict(module.named_modules()):
        children = ", ".join(name for name, _ in module.named_children())
        kind = type(module).__name__
        raise UsageError(f"features {features!r}: {kind} has no such submodule; its children are {children}")
    graph = weightless_graph(module, input_contract.size, features)
    frozen = freeze(graph, to_numpy(module.state_dict()), None if features is None else "output")
    compare_with_torch(frozen, module, input_contract, features)
    return save_bundle(
        frozen,
        Path(path),
        recipe=f"module:{type(module).__name__}",
        input_contract=input_contract,
        licence=licence,
        overwrite=overwrite,
    )


def compare_with_torch(
    frozen: Frozen, module: torch.nn.Module, contract: InputContract, features: str | None = None
) -> float:
    """The error of ONNX Runtime's features on the golden images against torch's, relative to the largest.

    Raises KsmEdgeError above 1e-4.
    """
    found = golden_features(frozen.model.SerializeToString(), frozen.layers, frozen.weights, contract)
    expected = torch_features(module, golden_images(contract), features)
    if found.shape != expected.shape:
        raise KsmEdgeError(f"the frozen graph gives features of the shape {found.shape}, torch {expected.shape}")
    error = relative_error(found, expected)
    if not error <= TOLERANCE:
        raise KsmEdgeError(
            f"the frozen graph's features differ from torch's by {error:.1e} of the largest (at most {TOLERANCE:.0e}); "
            "does the module compute something else for another image than the one it was traced with?"
        )
    return error


def torch_features(module: torch.nn.Module, images: np.ndarray, features: str | None = None) -> np.ndarray:
    """What the module itself gives as pooled features, (N, F), in eval mode and float32, for images (N, 3, H, W)."""
    first = next(module.parameters(), torch.zeros(0))
    if first.dtype != torch.float32:
        module = copy.deepcopy(module).float()  # the bundle holds float32, whatever the module computes in
    was_training = module.training
    module.eval()
    taken: list[torch.Tensor] = []
    try:
        with torch.no_grad(), _Capture(module, features, taken.append):
            module(torch.from_numpy(images).to(first.device))
    finally:
        module.train(was_training)
    if not taken:
        raise KsmEdgeError("no Linear layer was called; name the submodule whose output is the features")
    value = taken[0].cpu()
    return (value.mean((2, 3)) if value.ndim == 4 else value.flatten(1)).numpy()


class _Capture(TorchFunctionMode):
    """While it is entered: hand a submodule's output, or each Linear layer's input, to `take`."""

    def __init__(self, module: torch.nn.Module, features: str | None, take: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._take, self._linear = take, features is None
        self._hook = None
        if features is not None:
            self._hook = module.get_submodule(features).register_forward_hook(lambda _module, _inputs, out: take(out))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._linear and func is torch.nn.functional.linear:
            self._take(args[0])
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
        super().__exit__(*error)
