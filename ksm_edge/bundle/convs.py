"""Convs and the batch-norms behind them, taken out of the graph and into the layer table."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import onnx

from ksm_edge.bundle.canonical import Draft, Value
from ksm_edge.bundle.incoming import Node
from ksm_edge.errors import UnsupportedError, UsageError

# Where a frozen graph says its weights lie. No such file: they are given when a session is created.
ABSENT_FILE = "given-when-the-session-is-created"


@dataclass(frozen=True)
class Norm:
    """Names of a batch-norm's tensors in the incoming graph."""

    gamma: str
    beta: str
    mean: str
    var: str
    eps: float


@dataclass(frozen=True)
class ConvSite:
    """A Conv and where its tensors come from."""

    name: str
    weight: str
    bias: str  # "" where it has none
    weight_shape: tuple[int, int, int, int]  # (O, I, kh, kw)
    groups: int
    norm: Norm | None = None


class Convs:
    """The convs met so far, in graph order."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self.sites: dict[str, ConvSite] = {}  # by layer name
        self._bare: dict[str, str] = {}  # output of a Conv no batch-norm was taken up by, to its layer's name

    def add_conv(self, node: Node) -> None:
        """Write `node` as a canonical Conv and record it."""
        x = self._draft.bare_value(node)
        shape = self._weight_shape(node)
        groups = node.attributes.get("group", 1)
        if shape[1] * groups != x.channels:
            raise UsageError(f"{node.label}: weight {shape} with {groups} groups does not fit {x.channels} channels")
        site = ConvSite(self._layer_name(node), node.inputs[1], node.input(2), shape, groups)
        settings = {
            "strides": node.attributes.get("strides", [1, 1]),
            "dilations": node.attributes.get("dilations", [1, 1]),
        }
        own = _pads(node, shape, settings)
        pads = [pad + border for pad, border in zip(own, x.border, strict=True)]
        if not _reached(pads, shape, settings["dilations"]):
            x, pads = self._draft.value(node), own
        out = f"{site.name}.out"
        self._draft.nodes.append(
            onnx.helper.make_node(
                "Conv",
                [x.name, f"{site.name}.weight", f"{site.name}.bias"],
                [out],
                name=site.name,
                kernel_shape=shape[2:],
                group=groups,
                pads=pads,
                **settings,
            )
        )
        self._draft.initializers += [_outside(f"{site.name}.weight", shape), _outside(f"{site.name}.bias", shape[:1])]
        self.sites[site.name] = site
        self._bare[node.outputs[0]] = site.name
        still_pooled = x.kind == "pooled" and shape[2:] == (1, 1) and not any(pads)
        self._draft.values[node.outputs[0]] = Value(out, "pooled" if still_pooled else "map", shape[0])

    def add_norm(self, node: Node) -> None:
        """Dissolve a BatchNormalization into the Conv in front of it."""
        source = node.inputs[0]
        if source not in self._bare:
            raise UnsupportedError(
                f"{node.label} is not directly behind a Conv; only batch-norm that a Conv's weights can take up is "
                "supported. Put it behind its Conv, or end the backbone before it with --features NODE"
            )
        layer = self._bare.pop(source)
        if self._draft.uses[source] > 1:
            raise UnsupportedError(
                f"{node.label}: the output of its Conv {layer} is used elsewhere as well, so the batch-norm cannot "
                "be taken up by the Conv's weights. Change the network so that only the batch-norm reads it"
            )
        if node.attributes.get("training_mode") or any(node.outputs[1:]):  # as opsets below 14 say it
            raise UnsupportedError(f"{node.label} is in training mode; export the network in eval mode")
        eps = float(str(np.float32(node.attributes.get("epsilon", 1e-5))))  # 1e-05, not 9.999999747378752e-06
        gamma, beta, mean, var = node.inputs[1:5]
        self.sites[layer] = replace(self.sites[layer], norm=Norm(gamma, beta, mean, var, eps))
        self._draft.values[node.outputs[0]] = self._draft.values[source]

    def _weight_shape(self, node: Node) -> tuple[int, int, int, int]:
        name = node.inputs[1]
        source = self._draft.source
        # What the graph declares comes first, so that weights of another shape are refused as such later on.
        known = source.declared.get(name) or getattr(source.constants.get(name), "shape", None)
        if known is None:
            raise UnsupportedError(f"{node.label}: its weight {name!r} is computed by the graph; it must be a constant")
        if len(known) != 4:
            raise UnsupportedError(f"{node.label}: its weight is {known}; only 2-D convs (O, I, kh, kw) can be masked")
        if any(site.weight == name for site in self.sites.values()):
            raise UnsupportedError(
                f"{node.label}: its weight {name!r} is used by another Conv as well; each layer needs a mask of its "
                "own, so give each Conv its own copy"
            )
        O, I, kh, kw = known
        return O, I, kh, kw

    def _layer_name(self, node: Node) -> str:
        """`features.0.0` for the weight `features.0.0.weight`; else from the node's name, made plain and unique."""
        weight = node.inputs[1]
        if weight.endswith(".weight"):
            name = weight.removesuffix(".weight")
        else:
            name = (node.name or weight).removesuffix("/Conv").strip("/").replace("/", ".")
        plain = re.sub(r"[^A-Za-z0-9_.]+", "_", name) or "conv"
        unique, number = plain, 1
        while unique in self.sites:
            number += 1
            unique = f"{plain}_{number}"
        return unique


def _pads(node: Node, shape: tuple[int, ...], settings: dict[str, list[int]]) -> list[int]:
    """Explicit pads [top, left, bottom, right]."""
    auto = node.attributes.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        return list(node.attributes.get("pads", [0, 0, 0, 0])) if auto == "NOTSET" else [0, 0, 0, 0]
    if settings["strides"] != [1, 1]:
        raise UnsupportedError(
            f"{node.label}: auto_pad {auto} with strides {settings['strides']} pads by the image's size; "
            "export the network with explicit pads"
        )
    # A 4 x 4 kernel at dilation 1 wants 3 more pixels: SAME_UPPER puts 1 in front and 2 behind, SAME_LOWER 2 and 1.
    total = [(k - 1) * d for k, d in zip(shape[2:], settings["dilations"], strict=True)]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    return less + more if auto == "SAME_UPPER" else more + less


def _reached(pads: list[int], shape: tuple[int, ...], dilations: list[int]) -> bool:
    """Whether no window of a conv lies beside the image: the fast forms of its gradient are for such pads."""
    reach = [(k - 1) * d for k, d in zip(shape[2:], dilations, strict=True)]
    return all(pad <= most for pad, most in zip(pads, reach * 2, strict=True))


def _outside(name: str, shape: tuple[int, ...]) -> onnx.TensorProto:
    """An initializer that is declared but not here."""
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=ABSENT_FILE)
    return tensor
