"""Operators of training graphs that ONNX's reference evaluator lacks, or gets wrong, in numpy and in any float dtype.

Of onnx 1.23, ConvTranspose fails for several channels a group, MaxPool gives wrong indices at stride 1,
Pad cannot crop and DequantizeLinear begins at opset 19.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from types import EllipsisType
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from ksm_edge.errors import UnsupportedError


class FusedMatMul(OpRun):
    """com.microsoft FusedMatMul: alpha * A B, each transposed in its last two dimensions if asked."""

    op_domain = "com.microsoft"

    def _run(
        self, A: np.ndarray, B: np.ndarray, alpha: float = 1.0, transA: int = 0, transB: int = 0, **unused: Any
    ) -> tuple[np.ndarray]:
        for name, value in unused.items():  # transBatchA and transBatchB change the meaning: never guess
            if value:
                raise UnsupportedError(f"FusedMatMul with {name}={value} is not known to the reference runtime")
        left = np.swapaxes(A, -1, -2) if transA else A
        right = np.swapaxes(B, -1, -2) if transB else B
        return (left @ right * A.dtype.type(alpha),)


class DequantizeLinear(OpRun):
    """x * scale without a zero point, the scale a scalar or along `axis`."""

    op_domain = ""

    def _run(self, x: np.ndarray, scale: np.ndarray, axis: int = 1, **_of_newer_opsets: Any) -> tuple[np.ndarray]:
        column = scale.reshape(-1, *[1] * (x.ndim - 1 - axis)) if scale.ndim else scale
        return (x.astype(scale.dtype) * column,)


class Pad(OpRun):
    """Constant padding; a negative pad crops."""

    op_domain = ""

    def _run(
        self, x: np.ndarray, pads: np.ndarray, value: np.ndarray | None = None, mode: str = "constant"
    ) -> tuple[np.ndarray]:
        if mode != "constant":
            raise UnsupportedError(f"Pad with mode {mode!r} is not known to the reference runtime, only 'constant'")
        before, behind = np.split(pads, 2)
        grown = np.pad(x, np.maximum([before, behind], 0).T, constant_values=0 if value is None else value)
        kept = [slice(max(0, -b), n - max(0, -e)) for b, e, n in zip(before, behind, grown.shape, strict=True)]
        return (grown[tuple(kept)],)


class ConvTranspose(OpRun):
    """x (n, O, h, w), weight (O, I, kh, kw): every tap adds its share to the pixels it came from."""

    op_domain = ""

    def _run(
        self, x: np.ndarray, weight: np.ndarray, group: int = 1, strides: Sequence[int] | None = None,
        pads: Sequence[int] | None = None, dilations: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None, **_unused: Any,
    ) -> tuple[np.ndarray]:  # fmt: skip
        (n, O, h, w), (_, I, kh, kw) = x.shape, weight.shape
        s, d, more = strides or (1, 1), dilations or (1, 1), output_padding or (0, 0)
        top, left, bottom, right = pads or (0, 0, 0, 0)
        height, width = ((m - 1) * s[a] + d[a] * (k - 1) + 1 + more[a] for a, (m, k) in enumerate(((h, kh), (w, kw))))
        whole = np.zeros((n, group, I, height, width), x.dtype)
        parts, kernels = x.reshape(n, group, O // group, h, w), weight.reshape(group, O // group, I, kh, kw)
        for window, (i, j) in _windows((kh, kw), s, d, (h, w)):
            whole[window] += np.einsum("ngohw,goi->ngihw", parts, kernels[..., i, j])
        return (whole.reshape(n, group * I, height, width)[:, :, top : height - bottom, left : width - right],)


class MaxPool(OpRun):
    """The maxima and, as ONNX Runtime gives it, the flat index of each in the whole of x."""

    op_domain = ""

    def _run(
        self, x: np.ndarray, kernel_shape: Sequence[int] | None = None, strides: Sequence[int] | None = None,
        pads: Sequence[int] | None = None, dilations: Sequence[int] | None = None, ceil_mode: int = 0, **_unused: Any,
    ) -> tuple[np.ndarray, ...]:  # fmt: skip
        kernel, s, d = kernel_shape or (), strides or (1, 1), dilations or (1, 1)
        top, left, bottom, right = pads or (0, 0, 0, 0)
        sides = (x.shape[2] + top + bottom, x.shape[3] + left + right)
        span = [d[a] * (kernel[a] - 1) + 1 for a in (0, 1)]
        h, w = (-(-(sides[a] - span[a]) // s[a]) + 1 if ceil_mode else (sides[a] - span[a]) // s[a] + 1 for a in (0, 1))
        # With ceil_mode the last windows reach past the padding.
        over = [max(0, (m - 1) * s[a] + span[a] - sides[a]) for a, m in enumerate((h, w))]
        margins = ((0, 0), (0, 0), (top, bottom + over[0]), (left, right + over[1]))
        padded = np.pad(x, margins, constant_values=-np.inf)
        places = np.pad(np.arange(x.size).reshape(x.shape), margins, constant_values=-1)
        windows = [window for window, _ in _windows(kernel, s, d, (h, w))]
        values, indices = (np.stack([array[window] for window in windows]) for array in (padded, places))
        winner = values.argmax(0)[None]
        found = np.take_along_axis(values, winner, 0)[0], np.take_along_axis(indices, winner, 0)[0]
        return found[: len(self.onnx_node.output)]


def _windows(
    kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], output: Sequence[int]
) -> Iterator[tuple[tuple[EllipsisType, slice, slice], tuple[int, int]]]:
    """For each tap (i, j) of a kernel, the pixels that it meets: one for each pixel of the output (h, w)."""
    for tap in product(range(kernel[0]), range(kernel[1])):
        first = [tap[a] * dilations[a] for a in (0, 1)]
        last = [first[a] + (output[a] - 1) * strides[a] + 1 for a in (0, 1)]
        yield (..., slice(first[0], last[0], strides[0]), slice(first[1], last[1], strides[1])), tap


NEW_OPS = [FusedMatMul, DequantizeLinear, Pad, ConvTranspose, MaxPool]
