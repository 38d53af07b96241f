"""What a VJP rule sees: the emitter, the shapes, and where to leave the gradients it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ksm_edge.autodiff.graph import Emitter, Node, Shape

OVER_IMAGES = (0, 2, 3)  # and over rows and columns: what is left is (C,)


@dataclass(frozen=True)
class Gradient:
    """A gradient, (n, C, h, w), which may lack its last step so that a later operator can do it for nothing.

    `scale`, (C,): still to be multiplied in, channel by channel. `name` may be (n, C, 1, 1): still to be broadcast.
    """

    name: str
    scale: str | None = None


@dataclass
class Tape:
    """Reverse-mode state: gradients on their way from the loss to the image."""

    emit: Emitter
    shapes: Mapping[str, Shape]  # of every tensor of the forward graph
    wanted: frozenset[str]  # tensors that some trained parameter stands in front of
    own: bool = False  # with operators of `_operators.c`
    sums: dict[str, str] = field(default_factory=dict)  # of gradients (n, C, h, w) those whose (C,) is there already
    _pending: dict[str, list[Gradient]] = field(default_factory=dict)
    _broadcast: set[str] = field(default_factory=set)

    def add(self, tensor: str, gradient: str, *, scale: str | None = None, broadcast: bool = False) -> None:
        """Leave a contribution to the gradient of `tensor`."""
        if tensor in self.wanted:
            self._pending.setdefault(tensor, []).append(Gradient(gradient, scale))
            if broadcast:
                self._broadcast.add(gradient)

    def take(self, tensor: str) -> Gradient | None:
        """All contributions to the gradient of `tensor`, added up; None if there are none."""
        parts = self._pending.pop(tensor, [])
        if len(parts) <= 1:
            return parts[0] if parts else None
        # Those still to be broadcast come last: adding them to a whole one broadcasts them for nothing.
        parts.sort(key=lambda part: part.name in self._broadcast)
        total = self.scaled(parts[0])
        for part in parts[1:]:
            total = self.emit("Add", total, self.scaled(part))
        if parts[0].name in self._broadcast:
            self._broadcast.add(total)
        return Gradient(total)

    def scaled(self, gradient: Gradient) -> str:
        """The gradient with its channel scale multiplied in."""
        if gradient.scale is None:
            return gradient.name
        return self.emit("Mul", gradient.name, self.column(gradient.scale))

    def whole(self, gradient: Gradient, tensor: str) -> str:
        """The gradient as a full tensor of the shape of `tensor`."""
        name = self.scaled(gradient)
        if gradient.name in self._broadcast:
            name = self.emit("Expand", name, self.emit.shape(self.shapes[tensor]))
        return name

    def channel_sum(self, gradient: str) -> str:
        """(C,) of a gradient (n, C, h, w)."""
        return self.sums.get(gradient) or self.emit.sum(gradient, OVER_IMAGES)

    def column(self, vector: str) -> str:
        """A (C,) vector as (C, 1, 1), which broadcasts over (n, C, h, w)."""
        return self.emit("Unsqueeze", vector, self.emit.shape([1, 2]))


def gradient_wanted(nodes: list[Node], trained: frozenset[str]) -> frozenset[str]:
    """The tensors behind at least one trained conv: only through them does the backward pass go."""
    wanted: set[str] = set()
    for node in nodes:
        if any(name in wanted for name in node.inputs) or (node.op == "Conv" and node.name in trained):
            wanted.update(node.outputs)
    return frozenset(wanted)
