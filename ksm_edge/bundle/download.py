"""Fetch a file of weights once, checked, into a cache."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from ksm_edge.atomic import atomic_write
from ksm_edge.bundle.digest import file_sha256
from ksm_edge.errors import DamagedFileError, KsmEdgeError
from ksm_edge.resources import cache_folder

_TIMEOUT_SECONDS = 60


def fetch(url: str, digits: str, folder: Path | None = None) -> Path:
    """The file at `url`, downloaded unless a good copy lies in `folder` (default: the cache).

    digits: what its sha256 must begin with, hex; "" checks nothing. Raises KsmEdgeError where it cannot be had,
    DamagedFileError where it is not the file that was meant; nothing is kept then.
    """
    folder = folder or cache_folder()
    path = folder / url.rsplit("/", 1)[-1]
    if path.is_file() and file_sha256(path).startswith(digits):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer, atomic_write(path) as file:
            digest = hashlib.sha256()
            while block := answer.read(1 << 20):
                digest.update(block)
                file.write(block)
            _check(url, digest.hexdigest(), digits)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise KsmEdgeError(
            f"could not download {url} ({reason}); without a network, fetch it elsewhere and give it "
            "with --weights FILE"
        ) from error
    return path


def _check(url: str, found: str, digits: str) -> None:
    if not found.startswith(digits):
        raise DamagedFileError(
            f"{url}: the sha256 of what came is {found}, it should begin with {digits}; "
            "the download was cut off or changed on its way: try again"
        )
