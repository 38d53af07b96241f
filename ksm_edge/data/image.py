"""One image file as upright 8-bit RGB, and as the backbone's input.

Whatever a camera, a scanner or a web page gives: greyscale, palette, 1-bit, 16-bit, CMYK, transparent (laid on white),
turned by its EXIF tag. Files come from strangers, so only formats that are decoded in-process are let in, sizes are
checked before memory is spent, and every way to fail is a DataError that says what is wrong with the file.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ksm_edge.bundle.layers import InputContract
from ksm_edge.errors import DataError

MAX_FILE_BYTES = 256 * 2**20
# Pillow keeps 4 bytes a pixel: 160 MB, the most a board with 512 MB can spend on one picture.
MAX_DECODED_PIXELS = 40_000_000
# Beyond this Pillow itself begins to suspect a decompression bomb.
MAX_DECLARED_PIXELS = 89_478_485

_ORIENTATION = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def open_rgb(source: bytes | Path, *, short_side: int | None = None) -> Image.Image:
    """Decode a file, or the bytes of one, to an upright image of mode RGB.

    With `short_side` (pixels) a larger image comes out reduced, antialiased, to exactly that short side; a smaller one
    keeps its size. It also saves memory: a JPEG is decoded at 1/2, 1/4 or 1/8 where that is still large enough.

    Raises DataError for what cannot be decoded; the message begins with the path where one was given.
    """
    if isinstance(source, bytes):
        return _decode(source, short_side)
    try:
        return _decode(read_image_file(source), short_side)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def as_rgb(image: Image.Image, *, short_side: int | None = None) -> Image.Image:
    """The same of an image that is open already, or what a program made of one: its EXIF tag stands for what is to be
    done, and `PIL.ImageOps.exif_transpose` takes it away with the turn.
    """
    try:
        return _finished(image, short_side)
    except Exception as error:  # it may not have been decoded yet, or be closed
        raise DataError(_damaged(error)) from error


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height as declared in the file's header, before any EXIF turn. Raises DataError."""
    with _open(data) as image:
        return image.size


def to_input(image: Image.Image, contract: InputContract) -> np.ndarray:
    """An RGB image as the backbone wants it for evaluation: float32 (3, S, S), contiguous.

    Short side to `contract.resize` (bilinear, antialiased), centre crop to S = `contract.size`, (x / 255 - mean) / std.
    """
    return normalise(centre_crop(image, contract), contract)


def centre_crop(image: Image.Image, contract: InputContract) -> Image.Image:
    """The S x S part of an RGB image that evaluation looks at."""
    width, height = image.size
    if max(width, height) > 4 * min(width, height):
        # A strip of 3 x 10000 pixels would be blown up to gigabytes of which only the middle is used.
        width, height = (min(side, 4 * min(image.size)) for side in image.size)
        image = _crop_middle(image, width, height)
    # As torchvision rounds it: the long side downwards.
    image = image.resize(
        (contract.resize * width // min(width, height), contract.resize * height // min(width, height)),
        Image.Resampling.BILINEAR,
    )
    return _crop_middle(image, contract.size, contract.size)


def normalise(image: Image.Image, contract: InputContract) -> np.ndarray:
    """(x / 255 - mean) / std of an RGB image (H, W), float32 (3, H, W), contiguous."""
    pixels = np.asarray(image)
    planes = np.empty((3, *pixels.shape[:2]), np.float32)
    for plane, channel, mean, std in zip(planes, np.moveaxis(pixels, 2, 0), contract.mean, contract.std, strict=True):
        np.multiply(channel, np.float32(1 / (255 * std)), out=plane)
        plane -= np.float32(mean / std)
    return planes


def read_image_file(path: Path) -> bytes:
    """The bytes of an image file; DataError (without the path) where it cannot be read or is absurdly large."""
    try:
        check_file_size(path.stat().st_size)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})") from error


def check_file_size(size: int) -> None:
    """Raise DataError for a file that is too large to be read into memory."""
    if size > MAX_FILE_BYTES:
        raise DataError(f"{size} bytes is no sensible image file; the limit is {MAX_FILE_BYTES} bytes")


def _open(data: bytes) -> Image.Image:
    """The file's header read, no pixel decoded yet."""
    if not data:
        raise DataError("the file is empty (0 bytes)")
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and not _register_heif():
        raise DataError("HEIC images need one more package: pip install 'ksm-edge[heic]', or convert them to JPEG")
    try:
        image = Image.open(BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError:
        raise DataError(f"not an image of a known format ({', '.join(_formats())})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"declares more pixels than any photo has; the limit is {MAX_DECLARED_PIXELS}") from error
    except Exception as error:  # Pillow's plugins raise whatever a broken header trips over
        raise DataError(_damaged(error)) from error
    if image.width * image.height > MAX_DECLARED_PIXELS:
        raise DataError(f"declares {image.width}x{image.height} pixels; the limit is {MAX_DECLARED_PIXELS} in all")
    return image


def _decode(data: bytes, short_side: int | None) -> Image.Image:
    with _open(data) as image:
        try:
            if short_side:
                image.draft(None, (short_side, short_side))  # None keeps the mode
            if image.width * image.height > MAX_DECODED_PIXELS:
                raise DataError(
                    f"{image.width}x{image.height} pixels are too many to decode; the limit is {MAX_DECODED_PIXELS}"
                )
            return _finished(image, short_side)
        except DataError:
            raise
        except Exception as error:  # Pillow's plugins raise whatever broken pixels trip over
            raise DataError(_damaged(error)) from error


def _finished(image: Image.Image, short_side: int | None) -> Image.Image:
    """Upright, RGB, and no larger than asked for; a new image without the tag, so that nobody turns it again."""
    image.load()
    turn = _turn(image)  # only now: some formats have the tag behind the pixels
    pixels = _eight_bits(image)
    rgb = _reduced(pixels, short_side) if short_side else _rgb(pixels)
    upright = rgb.transpose(turn) if turn is not None else rgb
    upright.info = {}
    return upright


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What the EXIF tag asks to be done to the image; nothing where the tag cannot be read, as the pixels can."""
    if image.format == "TIFF":
        return None  # Pillow has done so when it loaded the pixels; older releases leave the tag as it was
    try:
        return _TURN.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - the parser raises whatever a broken block trips over
        return None


def _damaged(error: Exception) -> str:
    return f"damaged or cut short ({str(error) or type(error).__name__})"


def _reduced(image: Image.Image, short_side: int) -> Image.Image:
    """The image as RGB with at most that short side."""
    # Like Pillow's reducing_gap = 2: a cheap box filter first, leaving at least a halving to the good one.
    factor = min(image.size) // (2 * short_side)
    rgb = _boxed_down(image, factor) if factor >= 2 else _rgb(image)
    shortest = min(rgb.size)
    if shortest <= short_side:
        return rgb
    width, height = (max(short_side, round(side * short_side / shortest)) for side in rgb.size)
    return rgb.resize((width, height), Image.Resampling.BICUBIC)


def _boxed_down(image: Image.Image, factor: int) -> Image.Image:
    """1/factor of the image as RGB, in bands of rows, so that the full size exists once only, in the file's mode."""
    reduced = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    rows = factor * max(1, 256 // factor)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        reduced.paste(_rgb(band).reduce(factor), (0, top // factor))
    return reduced


def _rgb(image: Image.Image) -> Image.Image:
    """An image of any 8-bit mode as a new RGB one."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        overlay = image.convert("RGBA")
        if overlay.getchannel("A").getextrema()[0] == 255:  # nothing shines through
            return overlay.convert("RGB")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), overlay).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of more than 8 bits a pixel (modes I;16, I, F) as grey of 8 bits, the others as they are.

    White is 65535 in 16 bits, which some formats and older releases of Pillow open as I; for what has no agreed range,
    32-bit and float TIFF, the least of the usual ones that holds all values.
    """
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.nan_to_num(np.asarray(image, np.float32))
    tops = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((top for top in tops if values.max() <= top), float(values.max()))
    return Image.fromarray(np.clip(values * np.float32(255 / white) + np.float32(0.5), 0, 255).astype(np.uint8))


def _crop_middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


@lru_cache
def _register_heif() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    _formats.cache_clear()
    return True


@lru_cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of the formats let in. Left out are those that call other programs, as EPS does Ghostscript."""
    Image.init()
    wanted = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "HEIF")
    return tuple(name for name in wanted if name in Image.OPEN)
