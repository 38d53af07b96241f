"""Batch-norm with the statistics of the batch itself, forward and backward: the `batch` policy.

With the `frozen` policy none of this exists: there batch-norm is part of the fused weight and bias. `z` (n, C, h, w) is
the conv's output, m = n h w. The micro-batch must be the whole batch, or the statistics are not the batch's.
"""

from __future__ import annotations

import numpy as np

from ksm_edge.autodiff.conv import OVER_IMAGES, accumulate
from ksm_edge.autodiff.graph import Emitter
from ksm_edge.autodiff.tape import Tape
from ksm_edge.bundle.layers import Layer


def forward(emit: Emitter, layer: Layer, z: str, output: str) -> None:
    """output = gamma (z - mean) / sqrt(var + eps) + beta; mean and biased var (C,) are outputs of the graph."""
    name, shape = layer.name, (layer.weight_shape[0],)
    mean = emit("ReduceMean", z, name=emit.output(f"{name}.batch_mean", shape), axes=OVER_IMAGES, keepdims=0)
    centred = emit("Sub", z, emit("Unsqueeze", mean, emit.shape([1, 2])))
    square = emit("Mul", centred, centred)
    var = emit("ReduceMean", square, name=emit.output(f"{name}.batch_var", shape), axes=OVER_IMAGES, keepdims=0)
    gamma, beta = emit.input(f"{name}.gamma", shape), emit.input(f"{name}.beta", shape)
    emit("BatchNormalization", z, gamma, beta, mean, var, name=output, epsilon=layer.eps)


def backward(tape: Tape, layer: Layer, z: str, dy: str) -> str:
    """dz = a dy + b x + c per channel, with x the normalised z, made again rather than kept.

    a = gamma / sqrt(var + eps), b = -a dgamma / m, c = -a dbeta / m (Ioffe and Szegedy 2015, section 3).
    """
    emit, name, (n, C, h, w) = tape.emit, layer.name, tape.shapes[z]
    mean, var = f"{name}.batch_mean", f"{name}.batch_var"
    zeros, ones = emit.constant(np.zeros(C)), emit.constant(np.ones(C))
    normalised = emit("BatchNormalization", z, ones, zeros, mean, var, epsilon=layer.eps)
    dbeta = emit.sum(dy, OVER_IMAGES)
    dgamma = emit.sum(emit("Mul", dy, normalised), OVER_IMAGES)
    accumulate(tape, f"{name}.dbeta", (C,), dbeta)
    accumulate(tape, f"{name}.dgamma", (C,), dgamma)
    deviation = emit("Sqrt", emit("Add", var, emit.constant(layer.eps)))
    a = emit("Div", f"{name}.gamma", deviation)
    share = emit("Mul", a, emit.constant(-1 / (n * h * w)))
    b, c = emit("Mul", share, dgamma), emit("Mul", share, dbeta)
    rest = emit("BatchNormalization", z, b, c, mean, var, epsilon=layer.eps)
    return emit("Add", emit("Mul", dy, tape.column(a)), rest)
