import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from ksm_edge.bundle.layers import InputContract
from ksm_edge.data.augment import Augmentation, _jittered, augment, random_box
from ksm_edge.data.image import normalise, to_input

CONTRACT = InputContract(64, 72, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def rng(seed=0):
    return np.random.default_rng(seed)


def photo(width, height, low=0, high=255):
    coarse = rng().integers(low, high, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_none_is_the_evaluation_preprocessing():
    image = photo(100, 80)
    np.testing.assert_array_equal(augment(image, CONTRACT, Augmentation.none(), rng()), to_input(image, CONTRACT))


@pytest.mark.parametrize("size", [(100, 80), (3, 3), (1, 1), (400, 2), (2, 400), (64, 64)])
def test_a_view_is_contiguous_float32_within_black_and_white(size):
    mean, std = np.array(CONTRACT.mean)[:, None, None], np.array(CONTRACT.std)[:, None, None]
    for seed in range(20):
        view = augment(photo(*size), CONTRACT, Augmentation(0.35, brightness=0.8, contrast=0.8, flip=True), rng(seed))
        assert view.shape == (3, 64, 64)
        assert view.dtype == np.float32
        assert view.flags["C_CONTIGUOUS"]
        assert (view * std + mean >= -1e-6).all()
        assert (view * std + mean <= 1 + 1e-6).all()


def test_the_same_generator_gives_the_same_view():
    views = [augment(photo(100, 80), CONTRACT, Augmentation(0.35, flip=True), rng(seed)) for seed in (5, 5, 6)]
    np.testing.assert_array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])


@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted),
    st.integers(0, 2**32),
)
def test_a_box_lies_inside_with_the_asked_share_and_shape(width, height, scale, seed):
    left, top, right, bottom = random_box((width, height), tuple(scale), (3 / 4, 4 / 3), rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    assert 3 / 4 - 1e-6 <= w / h <= 4 / 3 + 1e-6
    share = w * h / (width * height)
    assert share <= scale[1] + 1e-6 or (w, h) == pytest.approx((min(width, h * 4 / 3), min(height, w * 4 / 3)))


def test_boxes_cover_the_range_of_shares():
    boxes = [random_box((200, 200), (0.35, 1), (3 / 4, 4 / 3), rng(seed)) for seed in range(400)]
    shares = [(right - left) * (bottom - top) / 200**2 for left, top, right, bottom in boxes]
    assert min(shares) < 0.4
    assert max(shares) > 0.9
    assert min(box[0] for box in boxes) < 5
    assert max(box[2] for box in boxes) > 195


@pytest.mark.parametrize("factors", [(1.2, 1, 1), (1, 0.8, 1), (1, 1, 0.7), (0.85, 1.15, 1.2)])
def test_jitter_equals_pillows_own_enhancements_where_nothing_is_clipped(factors):
    image = photo(64, 64, 90, 160)
    brightness, contrast, saturation = factors
    expected = ImageEnhance.Brightness(image).enhance(brightness)
    expected = ImageEnhance.Contrast(expected).enhance(contrast)
    expected = ImageEnhance.Color(expected).enhance(saturation)
    difference = _jittered(image, CONTRACT, *factors) - normalise(expected, CONTRACT)
    assert np.abs(difference).max() * 0.225 * 255 < 4  # of 255; Pillow cuts off fractions after each step


def test_grey_stays_grey_under_saturation():
    image = Image.new("RGB", (64, 64), (90, 90, 90))
    np.testing.assert_allclose(_jittered(image, CONTRACT, 1, 1, 1.5), normalise(image, CONTRACT), atol=1e-5)


def test_flipping_happens_only_where_asked_for():
    image = photo(72, 72)
    plain = Augmentation.none()
    flipping = Augmentation(crop_scale=None, brightness=0, contrast=0, saturation=0, flip=True)
    upright = to_input(image, CONTRACT)
    flips = 0
    for seed in range(40):
        np.testing.assert_array_equal(augment(image, CONTRACT, plain, rng(seed)), upright)
        view = augment(image, CONTRACT, flipping, rng(seed))
        flips += np.array_equal(view, upright[:, :, ::-1])
        assert np.array_equal(view, upright) or np.array_equal(view, upright[:, :, ::-1])
    assert 10 < flips < 30


def test_switching_the_flip_leaves_the_crop():
    image = photo(100, 100)
    for seed in range(5):
        plain = augment(image, CONTRACT, Augmentation(0.35), rng(seed))
        other = augment(image, CONTRACT, Augmentation(0.35, flip=True), rng(seed))
        assert np.allclose(plain, other, atol=1e-4) or np.allclose(plain, other[:, :, ::-1], atol=1e-4)
