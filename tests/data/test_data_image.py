import struct
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ksm_edge.bundle.layers import InputContract
from ksm_edge.data.image import image_size, open_rgb, to_input
from ksm_edge.errors import DataError

CONTRACT = InputContract(96, 110, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RED = (200, 30, 40)


def saved(image, kind, **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width, height, seed=0):
    """Smooth colours, as a photo has, so that JPEG changes them little."""
    coarse = np.random.default_rng(seed).integers(40, 215, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pixel(image, at=(20, 10)):
    return image.getpixel(at)


def close(image, other, tolerance):
    assert image.size == other.size
    assert np.abs(np.asarray(image, np.int64) - np.asarray(other, np.int64)).mean() <= tolerance


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("JPEG", {"quality": 95}, 2),
        ("JPEG", {"quality": 95, "progressive": True}, 2),
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 2.5),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("PPM", {}, 0),
    ],
)
def test_common_formats_decode_to_the_same_rgb(kind, options, tolerance, tmp_path):
    path = tmp_path / "photo"
    path.write_bytes(saved(photo(120, 80), kind, **options))
    image = open_rgb(path)
    assert image.mode == "RGB"
    close(image, photo(120, 80), tolerance)


def test_greyscale_has_three_equal_channels():
    grey = photo(60, 40).convert("L")
    assert np.ptp(np.asarray(open_rgb(saved(grey, "JPEG"))), axis=2).max() == 0
    assert pixel(open_rgb(saved(grey, "PNG"))) == (pixel(grey),) * 3


def test_one_bit_is_black_and_white():
    ink = photo(60, 40).convert("1")
    image = open_rgb(saved(ink, "PNG"))
    assert set(np.unique(np.asarray(image))) == {0, 255}
    close(image, ink.convert("RGB"), 0)


def test_palette_gives_its_colours():
    image = Image.new("P", (40, 20), 3)
    image.putpalette([0] * 9 + list(RED))
    assert pixel(open_rgb(saved(image, "PNG"))) == RED
    assert pixel(open_rgb(saved(image, "GIF"))) == RED


def test_transparent_pixels_are_laid_on_white():
    clear = Image.new("RGBA", (40, 20), (*RED, 0))
    half = Image.new("RGBA", (40, 20), (0, 0, 0, 128))
    assert pixel(open_rgb(saved(clear, "PNG"))) == (255, 255, 255)
    assert pixel(open_rgb(saved(half, "WEBP", lossless=True))) == (127, 127, 127)
    assert pixel(open_rgb(saved(Image.new("LA", (40, 20), (9, 0)), "PNG"))) == (255, 255, 255)
    palette = Image.new("P", (40, 20), 0)
    palette.putpalette(list(RED))
    assert pixel(open_rgb(saved(palette, "PNG", transparency=0))) == (255, 255, 255)
    assert pixel(open_rgb(saved(Image.new("RGB", (40, 20), RED), "PNG", transparency=RED))) == (255, 255, 255)


def test_cmyk_is_not_inverted():
    cyan = Image.new("CMYK", (40, 20), (255, 0, 0, 0))
    red, green, blue = pixel(open_rgb(saved(cyan, "JPEG")))
    assert red < 20
    assert min(green, blue) > 235


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(8, 0)
    image = np.asarray(open_rgb(saved(Image.fromarray(ramp), kind)))
    assert np.abs(image[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_big_endian_and_float_tiff_are_scaled():
    ramp = np.linspace(0, 65535, 256).astype(">u2")[None].repeat(8, 0)
    image = Image.frombytes("I;16B", (256, 8), ramp.tobytes())
    assert open_rgb(saved(image, "TIFF")).getpixel((255, 0)) == (255, 255, 255)
    unit = Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(8, 0))
    assert pixel(open_rgb(saved(unit, "TIFF")), (20, 4)) == (20, 20, 20)
    broken = Image.fromarray(np.full((8, 30), np.nan, np.float32))
    assert open_rgb(saved(broken, "TIFF")).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_turns_the_image_upright(kind, orientation):
    upright = photo(48, 32)
    backwards = [None, 0, 3, 1, 5, 2, 6, 4]  # Transpose members that undo what each tag asks for
    step = backwards[orientation - 1]
    stored = upright if step is None else upright.transpose(Image.Transpose(step))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    close(open_rgb(saved(stored, kind, exif=exif, **options)), upright, 2)
    reduced = open_rgb(saved(stored, kind, exif=exif, **options), short_side=16)
    assert reduced.size == (24, 16)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow tells of it, and that is all that should happen
def test_a_broken_exif_block_does_not_lose_the_image():
    block = b"Exif\0\0II*\0\xff\xff\xff\xff"
    for kind in ("JPEG", "PNG", "WEBP"):
        assert open_rgb(saved(photo(48, 32), kind, exif=block)).size == (48, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1600, 1200), (400, 300), (301, 1000), (200, 201), (517, 199)])
def test_short_side_is_met_exactly_by_larger_images_only(kind, size):
    full = photo(*size)
    image = open_rgb(saved(full, kind), short_side=200)
    assert min(image.size) == min(200, *size)
    assert max(image.size) / min(image.size) == pytest.approx(max(size) / min(size), rel=0.006)
    close(image, full.resize(image.size, Image.Resampling.BICUBIC), 2)


def test_reducing_is_antialiased():
    checks = np.indices((1200, 1200)).sum(0) % 2 * 255
    image = open_rgb(saved(Image.fromarray(checks.astype(np.uint8)), "PNG"), short_side=100)
    assert np.abs(np.asarray(image, int) - 127).max() <= 2


def test_reducing_keeps_transparency_and_palettes_right():
    image = Image.new("P", (1000, 1100), 0)
    image.putpalette(list(RED))
    assert pixel(open_rgb(saved(image, "PNG"), short_side=50)) == RED
    assert pixel(open_rgb(saved(image, "PNG", transparency=0), short_side=50)) == (255, 255, 255)


def heif_of(image):
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=90)
    return buffer.getvalue()


def test_heic_is_read_where_its_package_is_installed():
    close(open_rgb(heif_of(photo(128, 64))), photo(128, 64), 4)


def test_heic_without_its_package_says_what_to_install(monkeypatch):
    from ksm_edge.data import image

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    image._register_heif.cache_clear()
    with pytest.raises(DataError, match=r"ksm-edge\[heic\]"):
        open_rgb(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    image._register_heif.cache_clear()


def huge_png(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"this is a letter, not a photo\n" * 20, "not an image of a known format"),
        (saved(photo(200, 150), "JPEG")[:2000], "damaged or cut short"),
        (saved(photo(200, 150), "JPEG", progressive=True)[:-40], "damaged or cut short"),
        (saved(photo(200, 150), "PNG")[:3000], "damaged or cut short"),
        (saved(photo(200, 150), "WEBP")[:600], "damaged or cut short|not an image"),
        (saved(photo(200, 150), "JPEG")[:12], "not an image|damaged"),
        (huge_png(7000, 7000), "49000000|7000x7000 pixels are too many"),
        (huge_png(10000, 10000), "pixels"),
        (huge_png(60000, 60000), "pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
    ],
)
@pytest.mark.parametrize("short_side", [None, 64])
def test_what_cannot_be_decoded_is_named_with_its_reason(data, why, short_side, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"broken\.jpg: .*({why})"):
        open_rgb(path, short_side=short_side)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg: cannot be read \(No such file"):
        open_rgb(tmp_path / "gone.jpg")


def test_size_is_read_without_decoding():
    assert image_size(huge_png(5000, 6000)) == (5000, 6000)


def test_input_is_normalised_contiguous_float32():
    image = Image.new("RGB", (300, 200), (255, 0, 51))
    planes = to_input(image, CONTRACT)
    assert planes.shape == (3, 96, 96)
    assert planes.dtype == np.float32
    assert planes.flags["C_CONTIGUOUS"]
    expected = (np.array([1, 0, 0.2]) - CONTRACT.mean) / CONTRACT.std
    np.testing.assert_allclose(planes, np.broadcast_to(expected[:, None, None], planes.shape), rtol=2e-6)


def test_input_is_the_centre_of_the_resized_image():
    image = photo(330, 220)
    resized = image.resize((165, 110), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((34, 7, 130, 103)), np.float32)
    back = to_input(image, CONTRACT) * np.array(CONTRACT.std)[:, None, None] + np.array(CONTRACT.mean)[:, None, None]
    np.testing.assert_allclose(back.transpose(1, 2, 0) * 255, expected, atol=1e-3)


@pytest.mark.parametrize("size", [(3, 3), (1, 1), (3, 1), (8, 8), (3, 9000), (9000, 2)])
def test_images_of_a_few_pixels_are_enlarged(size):
    image = open_rgb(saved(photo(*size), "PNG"), short_side=110)
    planes = to_input(image, CONTRACT)
    assert planes.shape == (3, 96, 96)
    assert np.isfinite(planes).all()


def test_a_strip_is_cut_before_it_is_enlarged_with_the_same_result():
    strip = photo(330, 30)
    resized = strip.resize((1210, 110), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((557, 7, 653, 103)), np.float32)
    back = to_input(strip, CONTRACT) * np.array(CONTRACT.std)[:, None, None] + np.array(CONTRACT.mean)[:, None, None]
    assert np.abs(back.transpose(1, 2, 0) * 255 - expected).mean() < 1
