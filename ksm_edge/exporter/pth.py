"""State dicts in torch's own files (.pth, .pt, .th), read without running what is pickled in them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch

from ksm_edge.errors import DamagedFileError, UsageError


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a state dict, or of the one under "state_dict" in a checkpoint, by name.

    Raises UsageError for a whole pickled module, or anything else that is no state dict; DamagedFileError for a file
    that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"--weights {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path}: holds more than tensors, so it is not loaded; save its state_dict() alone, "
            "or hand the module to ksm_edge.exporter.module.export_module"
        ) from error
    except Exception as error:  # of a damaged file the reader makes whatever its bytes happen to say
        raise DamagedFileError(f"{path}: not a whole torch file ({error}); copy it again") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise UsageError(f"{path}: holds no state dict but a {type(content).__name__}")
    return to_numpy({name: value for name, value in content.items() if isinstance(value, torch.Tensor)})


def to_numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Torch tensors as numpy arrays; floating ones become float32, which numpy has and bfloat16 not."""
    return {
        name: (tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.detach().cpu()).numpy()
        for name, tensor in tensors.items()
    }
