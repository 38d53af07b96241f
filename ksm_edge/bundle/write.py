"""Write a bundle: whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ksm_edge.atomic import exchange
from ksm_edge.bundle.digest import backbone_digest, file_sha256
from ksm_edge.bundle.freeze import Frozen
from ksm_edge.bundle.golden import golden_record
from ksm_edge.bundle.layers import InputContract, Layer, LayerWeights
from ksm_edge.bundle.manifest import FORMAT_VERSION, GRAPH_NAME, NAME, WEIGHTS_NAME, layer_table, manifest_text
from ksm_edge.bundle.plain import golden_features
from ksm_edge.bundle.tensorfile import write_tensors
from ksm_edge.errors import UsageError


def stored_tensors(layers: tuple[Layer, ...], weights: Mapping[str, LayerWeights]) -> dict[str, np.ndarray]:
    """What a bundle keeps of each layer, as `LAYER.weight` and so on; what does nothing is left out.

    With batch-norm: weight, gamma, beta, mean, var, and bias where one of its values is not 0. Without: weight, beta.
    """
    tensors: dict[str, np.ndarray] = {}
    for layer in layers:
        held = weights[layer.name]
        kinds = ["weight", "gamma", "beta", "mean", "var"] if layer.has_norm else ["weight", "beta"]
        if layer.has_norm and held.bias.any():
            kinds.append("bias")
        tensors |= {f"{layer.name}.{kind}": getattr(held, kind) for kind in kinds}
    return tensors


def write_bundle(
    frozen: Frozen,
    path: Path,
    *,
    recipe: str,
    licence: str,
    input_contract: InputContract,
    overwrite: bool = False,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write `frozen` as the folder `path`, made whole beside its place and renamed into it.

    source: where the weights came from, kept in the manifest. The golden features are computed here, by ONNX Runtime.
    Raises UsageError where `path` exists and may not be replaced; only a bundle is ever replaced.
    """
    path = Path(os.path.realpath(path))  # where it is a link, that stays one
    _check_place(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _folder_beside(path) as temporary:
            _write_files(frozen, temporary, recipe, licence, input_contract, dict(source or {}))
            _sync(temporary)
            _check_place(path, overwrite)  # again, for what has come there meanwhile
            _replace(temporary, path)
            _sync(path.parent)
    except OSError as error:
        if error.errno is not None:  # a full disk has no name
            error.filename = error.filename or str(path)
        raise


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """An empty one, removed in the end unless it is elsewhere then, as are those that a kill or a power cut left."""
    prefix = f".{path.name}.unfinished-"
    for left in list(path.parent.iterdir()):
        if left.name.startswith(prefix):
            _remove_unless_in_use(left)
    folder, descriptor = _new_folder(path.parent, prefix)
    try:
        os.chmod(folder, 0o755)  # mkdtemp makes 0700: a bundle is to be read by the app's user
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _new_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """With a descriptor that says it is in use, while it is open."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        with suppress(FileNotFoundError):  # another export took it for one that was left, before it was locked
            descriptor = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def _remove_unless_in_use(folder: Path) -> None:
    with suppress(OSError):  # it is, or nobody can know
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(descriptor)


def _check_place(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir() or (any(path.iterdir()) and not (path / NAME).exists()):
        raise UsageError(f"{path} exists and is not a bundle; choose another --out")
    if any(path.iterdir()) and not overwrite:
        raise UsageError(f"{path} exists; choose another --out, or give --overwrite to replace it")


def _write_files(
    frozen: Frozen, folder: Path, recipe: str, licence: str, contract: InputContract, source: dict[str, Any]
) -> None:
    tensors = stored_tensors(frozen.layers, frozen.weights)
    with open(folder / WEIGHTS_NAME, "wb") as file:
        write_tensors(file, tensors)
    (folder / GRAPH_NAME).write_bytes(frozen.model.SerializeToString(deterministic=True))
    features = golden_features(folder / GRAPH_NAME, frozen.layers, frozen.weights, contract)
    content = {
        "format_version": FORMAT_VERSION,
        "recipe": recipe,
        "licence": licence,
        "source": source,
        "input": asdict(contract),
        "features": frozen.features,
        "backbone_digest": backbone_digest(tensors),
        "batch_norm": _batch_norm(frozen.layers),
        "files": {name: file_sha256(folder / name) for name in (GRAPH_NAME, WEIGHTS_NAME)},
        "golden": golden_record(contract, features),
        "layers": layer_table(frozen.layers),
    }
    (folder / NAME).write_text(manifest_text(content))


def _batch_norm(layers: tuple[Layer, ...]) -> str:
    if any(layer.has_norm for layer in layers):
        return "present"
    return "absent: the network has none, or it came in already folded into the convs"


def _sync(folder: Path) -> None:
    """Files first, then the folder that names them: a rename must not reach the disk before what it renames."""
    for entry in [*sorted(p for p in folder.iterdir() if p.is_file()), folder]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(new: Path, path: Path) -> None:
    """Put the folder `new` at `path`, and what is there, if anything is, out of the way."""
    if not path.exists():
        os.rename(new, path)
    elif not exchange(new, path):
        _replace_in_steps(new, path)


def _replace_in_steps(new: Path, path: Path) -> None:
    """The old bundle steps aside first and comes back if the rename fails."""
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")) / "old"
    try:
        os.rename(path, aside)
        try:
            os.rename(new, path)
        except BaseException:  # Ctrl-C too
            os.rename(aside, path)
            raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)
