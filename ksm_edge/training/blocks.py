"""Blocks of arrays: what numpy makes in several passes is in cache from one to the next."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK = 16_384  # elements: seven float32 blocks fit the 512 KiB of a small core's L2


def count_of_blocks(array: np.ndarray) -> int:
    """How many blocks hold all its elements, the last of them perhaps fewer."""
    return -(-array.size // BLOCK)


def block(array: np.ndarray, number: int) -> np.ndarray:
    """A view of some elements of an array, laid flat."""
    return array.reshape(-1)[number * BLOCK : (number + 1) * BLOCK]


def blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Views of arrays of one size, some elements at a time."""
    for number in range(count_of_blocks(arrays[0])):
        yield tuple(block(array, number) for array in arrays)
