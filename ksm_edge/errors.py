"""Every error a user can meet, as one tree; the command line turns each class into its exit code.

    KsmEdgeError                     1  failure
    ├── UsageError                   2  the call itself is off
    │   ├── DataError                2  images or folders that cannot be learned from
    │   └── KeyFileError             2  a file given as a key that is none of the kind needed
    ├── FileError                    3  a file that must not be used
    │   ├── DamagedFileError         3  bytes are not what they were when written
    │   ├── WrongBackboneError       3  a pack of another backbone
    │   ├── UnsupportedVersionError  3  a format version or codec this release does not know
    │   └── SignatureError           3  a signature that fits no given key
    │       └── UnsignedError        3  no signature where one is required
    ├── UnsupportedError             4  an operator or runtime that is not there
    └── BudgetError                  5  more memory than the budget allows

An error says what was given, what was needed, where, and what to do next.
"""

from __future__ import annotations


class KsmEdgeError(Exception):
    """The root: catching it catches everything this package raises on purpose."""

    exit_code = 1


class UsageError(KsmEdgeError):
    """The call is off: an unknown name, a value out of range, options that exclude each other."""

    exit_code = 2


class DataError(UsageError):
    """Images or folders that cannot be learned from: one class, no readable image, a missing split."""


class KeyFileError(UsageError):
    """A file given as a key holds none of the kind needed; the message says what it holds."""


class FileError(KsmEdgeError):
    """A file that must not be used."""

    exit_code = 3


class DamagedFileError(FileError):
    """Bytes are not what they were when written: a checksum, a length or a shape does not hold."""


class WrongBackboneError(FileError):
    """A pack was made for another backbone; the message names both digests."""


class UnsupportedVersionError(FileError):
    """A format version or codec that this release does not know."""


class SignatureError(FileError):
    """A pack's signature fits none of the keys given: signed by another, or changed since."""


class UnsignedError(SignatureError):
    """A pack has no signature where one is required."""


class UnsupportedError(KsmEdgeError):
    """An operator or runtime that is not there; the message says what is."""

    exit_code = 4


class BudgetError(KsmEdgeError):
    """More memory than the budget allows; the message names the smallest budget that would do, where it is known."""

    exit_code = 5

    def __init__(self, message: str, needed_bytes: int | None = None) -> None:
        """`needed_bytes`: that budget, where it is known."""
        super().__init__(message)
        self.needed_bytes = needed_bytes
