"""Loops that a compiler made wrong are noticed when they are loaded, and numpy does their work."""

from __future__ import annotations

import warnings
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import mistakes
import numpy as np
import pytest

from ksm_edge import known_answers, native
from ksm_edge.coding import keep

# By what goes wrong: whose answer it is, what is there, and what a compiler might have made of it.
MISTAKES = {
    "a long remainder": ("decode_keep", "is_long = remainder >= cutoff", "is_long = remainder > cutoff"),
    "bits behind the fourth byte": ("decode_keep", "return word << (bits->at & 7);", "return word << (bits->at & 6);"),
    "a column's class": ("decode_keep", "g % column_classes(layer)", "0 * column_classes(layer)"),
    "rows in turn": ("decode_keep", "(rank + 1) * widths[c]", "(rank + 1) * widths[c] + 1"),
    "the last score": ("apart", "i < some; i++)\n            flags", "i < some - 1; i++)\n            flags"),
    "no number": ("apart", "!(score[first + i] >= least)", "(score[first + i] < least)"),
    "the first of a few": ("apart", "if (!word)", "if (word < 2)"),
    "a bound that is not asked for": ("apart", "| (score[first + i] > most)", ""),
    "the last weight of a row": ("fuse", "i < kernels * size; i++", "i < kernels * size - 1; i++"),
    "another filter's factor": ("fuse", "made[i] = row[i] * factor[o];", "made[i] = row[i] * factor[o / 2];"),
    "the last of a kernel": ("fuse", "i < first + size; i++", "i < first + size - (size > 1); i++"),
    "rounded once": ("fuse", "(row[i] * scale[next]) * factor[o]", "row[i] * (scale[next] * factor[o])"),
    "the last of a row": ("feel", "i < kernels; i++, j++", "i < kernels - 1; i++, j++"),
    "half of the sums": ("feel", "half = SUMS / 2; half;", "half = SUMS / 2; half > 1;"),
    "what is cut twice": ("feel", "too_much += (1 - scale[next])", "too_much += 2 * (1 - scale[next])"),
    "another row's weight": ("feel", "weight + o * kernels : NULL", "weight : NULL"),
    "a product and a sum rounded once": (
        "adam", "mean[i] * rates.momentum + rates.gain * g;", "fmaf(mean[i], rates.momentum, rates.gain * g);"
    ),
    "every fourth square": ("adam", "square[i] = square[i]", "square[i] = square[i / 4 * 4]"),
    "the last parameter": ("adam", "i < count; i++) {\n        float g", "i < count - 1; i++) {\n        float g"),
    "an angle doubled too often": ("adam", "doubled < 4", "doubled < 5"),
    "what is infinite": ("adam", "return 2 * slope / (k + 4);", "return 2 * slope * k / (k * (k + 4));"),
    "a term of the series": ("adam", "1.0f / 360", "1.0f / 300"),
    "what stays": ("adam", "from == rates.stay ? from : to", "to"),
    "all of them refused": ("adam", "items(&a[2]) == size &&", "items(&a[2]) > size &&"),
}  # fmt: skip


def loaded(library: Path) -> ModuleType:
    """Compiled loops from a file, beside those that are in use."""
    name = "mistaken._native"  # a name in use would be theirs from then on
    spec = spec_from_file_location(name, library, loader=ExtensionFileLoader(name, str(library)))
    assert spec is not None
    return module_from_spec(spec)


def test_the_cuts_asked_for_are_what_the_bits_say() -> None:
    expected = known_answers.cuts()
    shapes = [known_answers.SHAPE] * len(expected)
    assert keep._encode_groups(expected, shapes) == known_answers.KEEP_BITS
    for found, cut in zip(keep._decode_groups(known_answers.KEEP_BITS, shapes), expected, strict=True):
        np.testing.assert_array_equal(found, cut)


def test_every_way_to_split_a_layer_is_asked_for() -> None:
    splits = [keep._best_split(cut, known_answers.SHAPE) for cut in known_answers.cuts() if cut.size]
    told_apart = {(split.rows is not None, split.columns is not None) for split in splits}
    assert told_apart == {(False, False), (True, False), (False, True), (True, True)}


def test_every_loop_is_asked(tmp_path: Path) -> None:
    library = mistakes.compiled(["_native.c"], tmp_path, "_native.c", "MAX_WIDTH = 25, ", "MAX_WIDTH = 25, ")
    loops = loaded(library)
    asked = {name for name, *_ in MISTAKES.values()}
    assert {name for name in dir(loops) if not name.startswith("_")} == asked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.trusted(loops) is loops


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_answer_is_noticed(mistake: str, tmp_path: Path) -> None:
    loop, text, other = MISTAKES[mistake]
    loops = loaded(mistakes.compiled(["_native.c"], tmp_path, "_native.c", text, other))
    assert known_answers.wrong(loops) == [loop]
    with pytest.warns(RuntimeWarning, match=f"not the right numbers from {loop}\\. .* numpy does the work"):
        assert native.trusted(loops) is None
