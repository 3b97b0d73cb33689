"""JPEG, PNG and WebP bytes to pixels, with nothing accepted in silence."""

import io

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

MAX_PIXELS = 50_000_000
"""A header that promises more is refused before anything is decoded: a few kB can claim gigabytes."""

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


def decode_image(data: bytes, channels: int, name: str) -> UInt8[np.ndarray, "h w channels"]:
    """JPEG, PNG or WebP bytes to uint8 (h, w, channels), channels 1 (grey) or 3 (RGB).

    An EXIF orientation is not applied, transparency is dropped, 16 bits are cut to 8; of an
    animation the first frame. Raises ValueError naming the sample for other formats, for damage (a
    JPEG decoder's warnings count), and above MAX_PIXELS.
    """
    assert channels in (1, 3), channels
    try:
        return decode(data, channels)
    except Exception as error:  # decoders raise anything from KeyError to SyntaxError on damaged input
        raise ValueError(f"{name}: cannot decode the image: {error}") from error


def decode(data: bytes, channels: int) -> np.ndarray:
    """`decode_image` for a caller with words of its own: raises whatever the decoder raises."""
    if data.startswith(_JPEG):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width)
        if colours in ("CMYK", "YCCK"):
            return _decode_pil(JpegImageFile(io.BytesIO(data)), channels)
        return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    if data.startswith(_PNG):
        _check_size(int.from_bytes(data[20:24]), int.from_bytes(data[16:20]))  # IHDR comes first
        return _decode_pil(PngImageFile(io.BytesIO(data)), channels)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _check_size(*_webp_size(data))
        return _decode_pil(WebPImageFile(io.BytesIO(data)), channels)
    raise ValueError(f"not a JPEG, PNG or WebP image (it begins with {data[:8]!r})")


def _check_size(height: int, width: int) -> None:
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"expected 1 to {MAX_PIXELS} pixels, its header says {height} x {width}")


def _webp_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the first chunk: extended, lossless or lossy."""
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return int.from_bytes(data[28:30], "little") & 0x3FFF, int.from_bytes(data[26:28], "little") & 0x3FFF


def _decode_pil(image: Image.Image, channels: int) -> np.ndarray:
    _check_size(image.height, image.width)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # convert() would clip at 255
    mode = "RGB" if channels == 3 else "L"
    pixels = np.array(image if image.mode == mode else image.convert(mode))  # a copy: PIL's is read-only
    return pixels.reshape(*pixels.shape[:2], channels)
