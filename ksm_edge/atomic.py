"""Files that are whole or absent: written beside their place, synced, then renamed into it; and folders likewise."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ksm_edge.errors import UsageError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # as in fcntl.h and linux/fs.h


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends without an error.

    A power cut or a full disk at any instant leaves the file that was there before, whole. Where `path` is a link, that
    is the file it leads to, and a file that is replaced hands on who may read it. OSError for what is no file, such as
    /dev/null: it would be replaced by one.
    """
    path = Path(os.path.realpath(path))
    if _is_something_else(path):
        raise OSError(errno.EINVAL, "is no regular file, which could be replaced", str(path))
    try:
        descriptor, temporary = _new_file(path)
    except OSError as error:
        error.filename = str(path)
        raise
    nameless = temporary is None
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            _hand_on_rights(path, file.fileno())
            os.fsync(file.fileno())
            if temporary is None:
                temporary = f"{path.parent}/.{path.name}.{os.urandom(4).hex()}"
                _give_name(file.fileno(), temporary)
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, temporary):
            error.filename = str(path)
        if temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        raise
    if nameless:
        with suppress(PermissionError):  # of a file that its owner may not read
            _sync(path)  # a file system may have put off what does not matter to a file without a name
    _sync(path.parent)


def _new_file(path: Path) -> tuple[int, str | None]:
    """Descriptor and name of one in the same folder. It has none, where the file system can do that: a kill or a power
    cut then leaves nothing of it, where checkpoints that were never finished would fill an SD card.
    """
    with suppress(OSError, AttributeError):  # such as an older overlayfs, vfat, NFS
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o600)
        if os.path.exists(_opened(descriptor)):
            return descriptor, None
        os.close(descriptor)
    return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")


def _opened(descriptor: int) -> str:
    """Where /proc has an open file, by which one without a name can be given one."""
    return f"/proc/self/fd/{descriptor}"


def _give_name(descriptor: int, name: str) -> None:
    """One beside the file that is to be replaced: nothing can be linked over that."""
    try:
        # Python follows the link, to the file that is open, only where it is given a folder, which is not looked at, as
        # the name is absolute.
        os.link(_opened(descriptor), name, dst_dir_fd=descriptor, follow_symlinks=True)
    except OSError as error:
        error.filename = name
        del error.filename2
        raise


def _hand_on_rights(path: Path, descriptor: int) -> None:
    """From the file that is there, if one is, to the one that will replace it."""
    try:
        before = path.stat()
    except FileNotFoundError:
        os.chmod(descriptor, 0o666 & ~_umask())  # it was made with 0600: a pack is to be read by the app's user
        return
    for owner in (-1, before.st_uid):  # only root may give files away, others to groups of theirs
        with suppress(OSError):
            os.chown(descriptor, owner, before.st_gid)
    os.chmod(descriptor, stat.S_IMODE(before.st_mode))


def exchange(one: Path, other: Path) -> bool:
    """Have two files or folders change places, at one instant; False where the system or the file system cannot."""
    with suppress(AttributeError):  # not Linux, or a C library from before 2018
        rename = ctypes.CDLL(None).renameat2
        return bool(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)
    return False


def require_writable(path: Path) -> None:
    """UsageError where `atomic_write` could not write, for who has long to compute first."""
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    if place.is_dir():
        raise UsageError(f"{path} cannot be written: it is a folder; give the name of a file in it")
    if _is_something_else(place):
        raise UsageError(f"{path} cannot be written: it is no regular file, and would be replaced by one")
    if not place.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {place.parent}; make it first")
    if not os.access(place.parent, os.W_OK):
        raise UsageError(f"{path} cannot be written: {place.parent} takes no files of yours; give another place")


def _is_something_else(path: Path) -> bool:
    """A device, a pipe, a folder."""
    return path.exists() and not path.is_file()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk: a power cut may undo a rename that has not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
