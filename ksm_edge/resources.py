"""Where the data folders are: beside the code in a wheel, at the repository's root in a checkout.

setup.cfg maps `ksm_edge.devices = devices` and `ksm_edge.recipes = export`. An editable install and a plain
`PYTHONPATH=.` both run the code out of the checkout, so the place of this file decides and no import finder is asked.
"""

from __future__ import annotations

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
