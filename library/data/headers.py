"""Image sizes from headers alone, and whether a file is whole, at some ten microseconds an image.

PNG, JPEG and WebP are read here, since a general library takes ten times as long to say the same. Whatever is unusual about a file is
left to Pillow: another format, an odd marker, and the truth about a file that seems cut off.
"""

from __future__ import annotations

import re
import struct
from io import FileIO

from library.data.settings import Size

LARGEST_AREA = 89_478_485
"""Pixels above which Pillow warns of decompression bombs: a small file may take gigabytes to decode. No larger image is decoded whole."""

LARGEST_REDUCED_AREA = 2 * LARGEST_AREA
"""Pixels of a JPEG file, which can be decoded at half the size; above it Pillow refuses to open a file."""

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
OPTIONAL_EXTENSIONS = frozenset({".avif", ".jxl"})
OTHER_IMAGE_EXTENSIONS = frozenset({".gif", ".tif", ".tiff", ".heic", ".heif", ".jfif", ".jp2", ".psd"})
"""Formats that are not trained on; files of theirs are worth a word, where other files are passed over in silence."""

_FIRST = 4096  # bytes read at once from the beginning, and of the end of longer files
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_NO_FRAME = frozenset({0xC4, 0xC8, 0xCC})  # of the markers C0..CF those that are no start of frame


class BadImageError(ValueError):
    """An image that can't be trained on; the message says why."""


class _Unusual(Exception):
    """The quick reader isn't sure; Pillow shall look, and decode where the file may be cut off."""

    def __init__(self, decode: bool = True):
        super().__init__()
        self.decode = decode


def usable_extensions() -> frozenset[str]:
    """The extensions, in lower case with a dot, that can be read here. AVIF and JPEG XL need Pillow's support or a plugin."""
    from PIL import Image

    for plugin in ("pillow_avif", "pillow_jxl"):
        _import_quietly(plugin)
    return EXTENSIONS | (OPTIONAL_EXTENSIONS & Image.registered_extensions().keys())


def _import_quietly(module: str) -> None:
    import importlib

    try:
        importlib.import_module(module)
    except ImportError:
        return


def image_size(path: str) -> Size:
    """(W, H) as the image is shown, that is after EXIF orientation. No pixels are decoded unless the file seems cut off.

    Raises BadImageError where the file is empty, no image, truncated, or too large to decode.
    """
    try:
        size = _quick_size(path)
    except _Unusual as unusual:
        size = _pillow_size(path, unusual.decode)
    except OSError as error:
        raise BadImageError(f"can't be read: {error.strerror or error}") from None
    if size[0] * size[1] > LARGEST_AREA:
        largest = LARGEST_REDUCED_AREA if _is_jpeg(path) else LARGEST_AREA
        if size[0] * size[1] > largest:
            raise BadImageError(
                f"{size[0]}x{size[1]} is larger than the {largest / 1e6:.0f} megapixels that are decoded: scale it down"
            )
    return size


def _is_jpeg(path: str) -> bool:
    with open(path, "rb") as file:  # noqa: PTH123
        return file.read(3) == b"\xff\xd8\xff"


def _pillow_size(path: str, decode: bool) -> Size:
    """The size by Pillow, with a trial decode where that is needed to find out whether the file is whole."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            width, height = image.size
            if decode and width * height <= LARGEST_AREA:
                image.load()
            turned = image.getexif().get(_ORIENTATION, 1) in _QUARTER_TURNS
    except UnidentifiedImageError:
        raise BadImageError("no image that can be read (another format, or damaged)") from None
    except Image.DecompressionBombError:
        raise BadImageError(
            f"larger than the {LARGEST_REDUCED_AREA / 1e6:.0f} megapixels that can be decoded"
        ) from None
    except Exception as error:  # a damaged file may raise anything in a decoder
        raise BadImageError(f"damaged or truncated: {error}") from None
    return (height, width) if turned else (width, height)


def _quick_size(path: str) -> Size:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - Path.open costs as much as all the rest
        head = file.read(_FIRST)
        if not head:
            raise BadImageError("the file is empty")
        if head[:8] == b"\x89PNG\r\n\x1a\n":
            return _png_size(file, head)
        if head[:3] == b"\xff\xd8\xff":
            return _jpeg_size(file, head)
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return _webp_size(file, head)
        if head[:2] == b"BM":
            raise _Unusual(decode=file.seek(0, 2) < int.from_bytes(head[2:6], "little"))
    raise _Unusual(decode=False)


def _tail(file: FileIO, head: bytes) -> bytes:
    """The last bytes of the file, or all of a short one."""
    if len(head) < _FIRST:
        return head
    file.seek(0, 2)
    file.seek(max(0, file.tell() - _FIRST))
    return file.read(_FIRST)


def _bytes_at(file: FileIO, head: bytes, start: int, length: int) -> bytes:
    """`length` bytes from `start`; raises _Unusual where the file ends before."""
    data = head[start : start + length]
    if len(data) < length:
        file.seek(start)
        data = file.read(length)
        if len(data) < length:
            raise _Unusual
    return data


# --- PNG (W3C Portable Network Graphics specification, 3rd edition, section 5) ---


def _png_size(file: FileIO, head: bytes) -> Size:
    length, kind, width, height = struct.unpack(">I4sII", _bytes_at(file, head, 8, 16))
    if (length, kind) != (13, b"IHDR") or width == 0 or height == 0:
        raise _Unusual
    tail = _tail(file, head)
    # Orientation may also stand after the pixels, as eXIf, or in text as an old "Raw profile" or XMP.
    if not tail.endswith(_PNG_END) or any(chunk in tail for chunk in (b"eXIf", b"Raw profile", b"XML:com.adobe.xmp")):
        raise _Unusual
    position, exif, xmp = 33, b"", b""
    while True:  # chunks before the pixels
        length, kind = struct.unpack(">I4s", _bytes_at(file, head, position, 8))
        if kind == b"IDAT":
            return _shown((width, height), exif, xmp)
        if kind == b"eXIf":
            exif = _bytes_at(file, head, position + 8, length)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = _bytes_at(file, head, position + 8, min(length, 19))
            if keyword.startswith(b"XML:com.adobe.xmp\x00\x00"):  # not compressed
                xmp = _bytes_at(file, head, position + 8, length)
            elif keyword.startswith((b"Raw profile", b"XML:com.adobe.xmp")):
                raise _Unusual
        elif kind == b"IEND":
            raise _Unusual
        position += 12 + length


# --- JPEG (ITU-T T.81, annex B) ---

_EXIF = b"Exif\x00\x00"
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\x00"


def _jpeg_size(file: FileIO, head: bytes) -> Size:
    """Walk the segments up to the start of scan."""
    size: Size | None = None
    position, exif, xmp = 2, b"", b""
    while True:
        mark, code, length = struct.unpack(">BBH", _bytes_at(file, head, position, 4))
        if mark != 0xFF or code in (0xFF, 0xD9) or length < 2:  # fill bytes, an early end, or no marker at all
            raise _Unusual
        if code == 0xDA:
            break
        if 0xC0 <= code <= 0xCF and code not in _NO_FRAME:
            height, width = struct.unpack(">HH", _bytes_at(file, head, position + 5, 4))
            size = (width, height)
        elif code == 0xE1:
            segment = _bytes_at(file, head, position + 4, length - 2)
            if segment.startswith(_EXIF) and exif:
                raise _Unusual
            if segment.startswith(_EXIF):
                exif = segment
            elif segment.startswith(_JPEG_XMP):
                xmp = segment
        position += 2 + length
    if size is None or 0 in size:
        raise _Unusual
    if not _has_end(file, head, position):
        raise BadImageError("truncated: the end marker is missing")
    return _shown(size, exif, xmp)


def _has_end(file: FileIO, head: bytes, scan: int) -> bool:
    """Whether an end marker follows the start of scan; one before it belongs to a thumbnail. Data after the end are no fault."""
    if b"\xff\xd9" in _tail(file, head)[-16:]:
        return True
    file.seek(scan)
    return b"\xff\xd9" in file.read()


# --- WebP (RFC 9649) ---


def _webp_size(file: FileIO, head: bytes) -> Size:
    end = int.from_bytes(head[4:8], "little") + 8
    if file.seek(0, 2) < end or len(head) < 30:
        raise _Unusual
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and head[20] == 0x2F:
        (bits,) = struct.unpack("<I", head[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind != b"VP8X":
        raise _Unusual
    size = int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    chunks = _webp_chunks(file, head, end) if head[20] & 0x0C else {}  # the flags of EXIF and XMP
    return _shown(size, chunks.get(b"EXIF", b""), chunks.get(b"XMP ", b""))


def _webp_chunks(file: FileIO, head: bytes, end: int) -> dict[bytes, bytes]:
    """The metadata chunks of a WebP file."""
    chunks: dict[bytes, bytes] = {}
    position = 12
    while position + 8 <= end:
        kind, length = struct.unpack("<4sI", _bytes_at(file, head, position, 8))
        if kind in (b"EXIF", b"XMP "):
            chunks[kind] = _bytes_at(file, head, position + 8, length)
        position += 8 + length + length % 2
    return chunks


# --- orientation: EXIF (TIFF 6.0, section 2), else XMP ---


def _shown(size: Size, exif: bytes, xmp: bytes) -> Size:
    """`size` with its sides changed where the metadata turn the image by a quarter. EXIF comes before XMP."""
    orientation = _exif_orientation(exif.removeprefix(_EXIF)) if exif else None
    if orientation is None and (said := _XMP_ORIENTATION.search(xmp)):
        orientation = int(said.group(1))
    return (size[1], size[0]) if orientation in _QUARTER_TURNS else size


def _exif_orientation(block: bytes) -> int | None:
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        raise _Unusual
    try:
        (start,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number, value = struct.unpack_from(order + "HHIH", block, entry)
            if tag == _ORIENTATION:
                if (kind, number) != (3, 1):
                    raise _Unusual
                return int(value)
    except struct.error:
        raise _Unusual from None
    return None
