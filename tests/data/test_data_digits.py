import importlib.util
from collections import Counter

import numpy as np
import pytest

from ksm_edge.data import digits as module
from ksm_edge.data.digits import digits
from ksm_edge.data.image import open_rgb
from ksm_edge.errors import UsageError

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")


@needs_sklearn
def test_digits_have_ten_classes_and_a_stratified_test_part():
    images = digits()
    assert images.classes == tuple("0123456789")
    assert len(images.train) + len(images.test) == 1797
    shares = Counter(item.label for item in images.test)
    everything = Counter(item.label for item in images.train) + shares
    assert all(abs(shares[label] - everything[label] / 4) < 1 for label in range(10))
    assert not {item.source for item in images.train} & {item.source for item in images.test}


@needs_sklearn
def test_digits_are_the_same_every_time():
    assert digits().digest() == digits().digest()


@needs_sklearn
def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    loaded = datasets.load_digits()
    images = digits()
    for item in images.train[::200]:
        index = int(item.source.split("/")[-1].removesuffix(".pgm"))
        assert loaded.target[index] == item.label
        image = open_rgb(images.read(item))
        small = np.asarray(image.convert("L").reduce(4), float) / 255 * 16
        assert np.corrcoef(small.ravel(), loaded.images[index].ravel())[0, 1] > 0.97


@needs_sklearn
def test_digits_survive_a_scikit_learn_that_keeps_its_table_elsewhere(monkeypatch):
    before = digits()
    monkeypatch.setattr(module.Path, "is_file", lambda path: False)
    assert digits().digest() == before.digest()
    assert digits().read(before.test[0]) == before.read(before.test[0])


def test_without_scikit_learn_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ksm-edge\[demo\]'"):
        digits()
