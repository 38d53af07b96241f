"""Less memory for more time: what the forward pass kept for the backward pass is computed again when it is needed.

The forward pass is cut where a single tensor is all that later operators read. Between two such cuts lies a segment,
such as an inverted residual block; only its first tensor is kept, and its operators run a second time, on the same
numbers, right in front of the first operator of the backward pass that reads one of their results. So gradients are
the same to the last bit. (Chen, Xu, Zhang, Guestrin: Training deep nets with sublinear memory cost, 2016.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx

from ksm_edge.autodiff.halved import kept_in_half, taken_bytes
from ksm_edge.autodiff.liveness import tensor_bytes

AGAIN = "~again"  # behind the names of what is computed a second time


def with_least_kept(model: onnx.ModelProto, forward: int, *, half: bool = False) -> onnx.ModelProto:
    """The gradient graph, of which the first `forward` nodes are the forward pass, in the form that takes least memory.

    Of the results that it can be cut at those up to some size are kept: which size is best is tried out. `half`: in
    half precision, where that gains; then gradients err.
    """
    nodes, sizes = list(model.graph.node), tensor_bytes(model)
    candidates = {name: sizes[name] for i in cuts(nodes[:forward]) for name in nodes[i].output[:1]}
    forms = [model]
    for limit in set(candidates.values()):
        form = onnx.ModelProto()
        form.CopyFrom(model)
        del form.graph.node[:]
        form.graph.node.extend(recomputed(nodes, forward, {n for n, size in candidates.items() if size <= limit}))
        forms.append(form)
    if half:
        forms += [kept_in_half(form, forward) for form in forms]
    # Of equals the one that computes least again.
    return min(forms, key=lambda form: (taken_bytes(form), len(form.graph.node)))


def recomputed(nodes: Sequence[onnx.NodeProto], forward: int, kept: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes, of which the first `forward` are the forward pass, with all of that computed again but what is `kept`.

    `kept`: results of nodes at `cuts`. What lies behind the last of them is not computed again: the backward pass
    begins with it.
    """
    ends = [index for index in cuts(nodes[:forward]) if set(nodes[index].output) & set(kept)]
    segments = [nodes[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]
    again = {name: segment for segment in segments for node in segment for name in node.output}
    result, ready = list(nodes[:forward]), set[str]()
    for node in nodes[forward:]:
        for name in node.input:
            if name in again and name not in ready:
                result += _second_time(again[name], name, ready)
        result.append(_renamed(node, ready))
    return result


def _second_time(segment: Sequence[onnx.NodeProto], name: str, ready: set[str]) -> list[onnx.NodeProto]:
    """The nodes that make `name`, as far as they are not `ready` yet, under names of their own; then they are."""
    wanted, chosen = {name}, []
    for node in reversed(segment):
        if wanted & set(node.output) - ready:
            chosen.append(node)
            wanted |= set(node.input)
    found = []
    for node in reversed(chosen):
        twin = _renamed(node, ready)
        twin.name += AGAIN
        for place, output in enumerate(twin.output):
            twin.output[place] = output + AGAIN if output else output
        found.append(twin)
        ready |= set(node.output)
    return found


def _renamed(node: onnx.NodeProto, ready: set[str]) -> onnx.NodeProto:
    """The node, reading second results where there are any."""
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    for place, name in enumerate(twin.input):
        twin.input[place] = name + AGAIN if name in ready else name
    return twin


def cuts(forward: Sequence[onnx.NodeProto]) -> list[int]:
    """Indices of the nodes behind which later nodes read nothing that came before but this node's own results."""
    last = {name: index for index, node in enumerate(forward) for name in node.input}
    found, reach = [], -1  # the last node that reads anything made so far, the latest results apart
    for index, node in enumerate(forward):
        if reach <= index:
            found.append(index)
        reach = max([reach, *(last.get(name, -1) for name in node.output)])
    return found
