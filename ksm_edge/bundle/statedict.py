"""State dicts in safetensors files: a network's tensors by name, without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ksm_edge.errors import DamagedFileError, UsageError


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a `.safetensors` file, by name.

    Raises UsageError where there is no such file or it is of another kind, DamagedFileError where it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"--weights {path}: no such file")
    if path.suffix != ".safetensors":
        raise UsageError(f"--weights {path}: a .safetensors file is needed here")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedFileError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path}: holds a number type numpy lacks ({error}); save it as float32") from error
