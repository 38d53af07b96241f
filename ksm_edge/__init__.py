"""Teach one frozen vision backbone new tasks on the device itself, each kept as a small task pack.

Every name is loaded when it is first used, so that `import ksm_edge` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ksm_edge.adapt.journey import adapt as adapt_task
    from ksm_edge.app.app import App, Prediction
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.data.image_set import open_image_set
    from ksm_edge.device import Device
    from ksm_edge.errors import KsmEdgeError
    from ksm_edge.fuse import fuse as fuse_weights
    from ksm_edge.pack.files import load_pack, save_pack
    from ksm_edge.training.settings import Settings

__version__ = "0.1.0"

# `adapt` and `fuse` are taken: once imported, a module is an attribute of its package under its own name.
_HOMES = {
    "App": "ksm_edge.app.app:App",
    "Device": "ksm_edge.device:Device",
    "KsmEdgeError": "ksm_edge.errors:KsmEdgeError",
    "Prediction": "ksm_edge.app.app:Prediction",
    "Settings": "ksm_edge.training.settings:Settings",
    "adapt_task": "ksm_edge.adapt.journey:adapt",
    "fuse_weights": "ksm_edge.fuse:fuse",
    "load_bundle": "ksm_edge.bundle.load:load_bundle",
    "load_pack": "ksm_edge.pack.files:load_pack",
    "open_image_set": "ksm_edge.data.image_set:open_image_set",
    "save_pack": "ksm_edge.pack.files:save_pack",
}
__all__ = [
    "App",
    "Device",
    "KsmEdgeError",
    "Prediction",
    "Settings",
    "__version__",
    "adapt_task",
    "fuse_weights",
    "load_bundle",
    "load_pack",
    "open_image_set",
    "save_pack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
