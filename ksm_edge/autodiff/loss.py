"""The head and softmax cross-entropy, forward and backward.

`target` (n, C) holds each image's target distribution times its share of the optimizer step: label smoothing, class
weights and micro-batches are all in these numbers, so that the sum of the losses of a step's micro-batches is the
loss of the step. A row of zeros is an image that does not count.

The head's names hold a colon, which no layer's does: a backbone may well have a layer called `head`.
"""

from __future__ import annotations

from ksm_edge.autodiff.graph import Emitter
from ksm_edge.autodiff.tape import Tape


def forward(emit: Emitter, features: str, shape: tuple[int, int], classes: int) -> None:
    """features (n, F) -> logits (n, C) and the loss, a scalar."""
    n, F = shape
    target = emit.input("target", (n, classes))
    weight, bias = emit.input("head:weight", (classes, F)), emit.input("head:bias", (classes,))
    logits = emit("Gemm", features, weight, bias, name=emit.output("logits", (n, classes)), transB=1)
    log_probability = emit("LogSoftmax", logits, axis=1)
    total = emit.sum(emit("Mul", target, log_probability), [0, 1])
    emit("Neg", total, name=emit.output("loss", ()))


def backward(tape: Tape, features: str, classes: int) -> None:
    """The head's gradients into their accumulators, and the gradient of the features, if it is wanted."""
    emit, F = tape.emit, tape.shapes[features][1]
    share = emit.sum("target", [1], keepdims=True)
    dlogits = emit("Sub", emit("Mul", emit("Softmax", "logits", axis=1), share), "target")
    accumulator = emit.input("acc:head:dweight", (classes, F))
    emit("Gemm", dlogits, features, accumulator, name=emit.output("head:dweight", (classes, F)), transA=1)
    bias = emit.input("acc:head:dbias", (classes,))
    emit("Add", bias, emit.sum(dlogits, [0]), name=emit.output("head:dbias", (classes,)))
    if features in tape.wanted:
        tape.add(features, emit("MatMul", dlogits, "head:weight"))
