"""Write a bundle's ExecuTorch program, delegated to XNNPACK, with all weights in a data file of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ksm_edge.atomic import atomic_write
from ksm_edge.bundle.golden import TOLERANCE, golden_images, relative_error
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.mobile import DATA, HEAD_BIAS, HEAD_WEIGHT, PROGRAM, ROWS, TABLE, MobileProgram, Placed
from ksm_edge.errors import KsmEdgeError, UnsupportedError
from ksm_edge.fuse import fuse
from ksm_edge.runtimes import executorch, load_runtime
from ksm_edge.runtimes.pytorch import Graph, features, read_graph, with_weights

TAG = "task"  # of the weights: ExecuTorch's name for a data file
# How XNNPACK may have laid a weight out: dense convs as (O, kh, kw, I), depthwise ones as (I, kh, kw, O).
ORDERS = {4: ((0, 1, 2, 3), (0, 2, 3, 1), (1, 2, 3, 0)), 2: ((0, 1), (1, 0)), 1: ((0,),)}


class _Network(torch.nn.Module):
    """image (1, 3, S, S) -> features (1, F), logits (1, rows)."""

    def __init__(self, graph: Graph, weights: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.graph = graph
        for name, weight in weights.items():
            self.register_buffer(_attribute(name), torch.tensor(weight))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = dict(self.named_buffers())
        convs = with_weights({name: tensors[_attribute(name)] for name in self.graph.weights})
        found = features(self.graph, image, convs)
        head = (tensors[_attribute(name)] for name in (HEAD_WEIGHT, HEAD_BIAS))
        return found, torch.nn.functional.linear(found, *head)


def write_program(bundle: Bundle, rows: int = ROWS) -> MobileProgram:
    """Write the three files into the bundle's folder, and compare what they compute with ONNX Runtime.

    `rows`: the most classes that a task may have. UnsupportedError where a weight does not end up in the data file.
    """
    distinct = _distinct(bundle, rows)
    program, data = _lowered(bundle, distinct)
    tensors = {name: _placed(data, name, array) for name, array in distinct.items()}
    _write(bundle.path / PROGRAM, program)
    _write(bundle.path / DATA, data)
    written = MobileProgram(bundle.path / PROGRAM, bundle.path / DATA, rows, tensors)
    _write(written.data, written.data_with(fuse(bundle, None)))
    _write(bundle.path / TABLE, written.table().encode())
    try:
        _compare(bundle)
    except BaseException:
        (bundle.path / TABLE).unlink()  # without it there is no program
        raise
    return written


def _distinct(bundle: Bundle, rows: int) -> dict[str, np.ndarray]:
    """Weights none of which is like another: tensors of equal content would share one place in the data file."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {name: array.shape for name, array in fuse(bundle, None).items()}
    shapes |= {HEAD_WEIGHT: (rows, bundle.features), HEAD_BIAS: (rows,)}
    return {name: rng.random(shape, dtype=np.float32) for name, shape in shapes.items()}


def _lowered(bundle: Bundle, weights: Mapping[str, np.ndarray]) -> tuple[bytes, bytes]:
    """The program and its data file."""
    network = _Network(read_graph(bundle.graph_path), weights).eval()
    image = (torch.zeros(1, 3, bundle.input.size, bundle.input.size),)
    with warnings.catch_warnings(), _without_logs():
        warnings.simplefilter("ignore")  # about their own future releases
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes.external_constants_pass import delegate_external_constants_pass_unlifted

        module = torch.export.export(network, image).module()
        # Weights that XNNPACK takes are tagged before it does; `external_constants` moves those that it leaves.
        delegate_external_constants_pass_unlifted(module, lambda node: TAG)
        edge = to_edge_transform_and_lower(torch.export.export(module, image), partitioner=[XnnpackPartitioner()])
        made = edge.to_executorch(ExecutorchBackendConfig(external_constants=lambda node: TAG))
    if set(made._tensor_data) != {TAG}:
        raise UnsupportedError(f"ExecuTorch wrote the data files {', '.join(made._tensor_data) or 'none'}")
    return bytes(made.buffer), bytes(made._tensor_data[TAG])


def _placed(data: bytes, name: str, array: np.ndarray) -> Placed:
    for axes in ORDERS[array.ndim]:
        content = np.ascontiguousarray(array.transpose(axes)).tobytes()
        offset = data.find(content)
        if offset >= 0 and data.find(content, offset + 1) < 0:
            return Placed(offset, axes, array.shape)
    raise UnsupportedError(
        f"ExecuTorch keeps {name} {array.shape} in the program, or in an order that is not known here"
    )


def _compare(bundle: Bundle) -> None:
    images, weights = golden_images(bundle.input), fuse(bundle, None)
    found = executorch.Session(bundle.graph_path, weights).run(images)
    expected = load_runtime().Session(bundle.graph_path, weights).run(images)
    error = relative_error(found, expected)
    if not error <= TOLERANCE:
        raise KsmEdgeError(f"{bundle.path / PROGRAM}: off by {error:.1e} of the largest feature from ONNX Runtime")


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def _attribute(name: str) -> str:
    """As torch allows it, which keeps the dot for itself."""
    return name.replace(".", "/")


@contextmanager
def _without_logs() -> Iterator[None]:
    """ExecuTorch and torch.export tell of their inner life."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
