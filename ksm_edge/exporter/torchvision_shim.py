"""Import torchvision where only a CPU build of torch is installed.

torchvision's wheel on PyPI for x86-64 Linux is built against CUDA; beside a CPU build of torch its C extension cannot
be loaded, and the import fails with `operator torchvision::nms does not exist`. Models, transforms and datasets need
nothing of that extension, so it is enough to declare the schemas of the two operators that the import asks for.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

_DECLARED: list[Any] = []  # a torch Library takes its operators with it when it is collected


def import_torchvision() -> ModuleType:
    """The torchvision module, whichever build of torch it meets."""
    import torch

    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
    return importlib.import_module("torchvision")
