"""Where things are: the data folders, beside the code in a wheel and at the root in a checkout, and the cache.

setup.cfg maps `ksm_edge.devices = devices` and `ksm_edge.recipes = export`. An editable install and a plain
`PYTHONPATH=.` both run the code out of the checkout, so the place of this file decides and no import finder is asked.
"""

from __future__ import annotations

import os
from pathlib import Path

from ksm_edge.errors import KsmEdgeError

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT_FOLDERS = {"ksm_edge.devices": "devices", "ksm_edge.recipes": "export"}  # as package_dir in setup.cfg


def data_folder(package: str) -> Path:
    """The folder that holds the data files of `package`, such as "ksm_edge.devices"; raises KsmEdgeError when absent.

    >>> (data_folder("ksm_edge.devices") / "host.toml").is_file()
    True
    """
    installed = _PACKAGE.joinpath(*package.split(".")[1:])
    checkout = _PACKAGE.parent / _CHECKOUT_FOLDERS.get(package, "")
    for folder in (installed, checkout):
        if folder.is_dir() and folder != _PACKAGE.parent:
            return folder
    raise KsmEdgeError(f"the data of {package} is in neither {installed} nor {checkout}: install ksm-edge again")


def cache_folder() -> Path:
    """Where downloads and compiled graphs are kept: $KSM_EDGE_CACHE, else ksm_edge in the user's cache folder."""
    given = os.environ.get("KSM_EDGE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ksm_edge"
