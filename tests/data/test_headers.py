"""Sizes from headers are those that Pillow shows after EXIF orientation, and broken files are told apart from whole ones."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from library.data import headers
from library.data.headers import BadImageError, image_size

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def encoded(kind: str, size: tuple[int, int], mode: str = "RGB", **options: object) -> bytes:
    noise = random.Random(0).randbytes(size[0] * size[1] * 3)
    image = Image.frombytes("RGB", size, noise).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(folder: Path, content: bytes, name: str = "image") -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def shown(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).size


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[headers._ORIENTATION] = orientation
    block[0x010E] = "a description"
    return block.tobytes()


@pytest.fixture
def without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that needs Pillow fails the test: the quick reader must know it."""

    def refuse(path: str, decode: bool) -> None:
        raise AssertionError(f"{path} went to Pillow")

    monkeypatch.setattr(headers, "_pillow_size", refuse)


@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_common_formats_are_read_without_pillow_and_in_the_orientation_shown(
    tmp_path: Path, kind: str, orientation: int | None, without_pillow: None
) -> None:
    options = {} if orientation is None else {"exif": exif(orientation)}
    path = write(tmp_path, encoded(kind, (123, 77), **options))
    expected = (77, 123) if orientation in (5, 6, 7, 8) else (123, 77)
    assert image_size(path) == expected == shown(path)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("both", [False, True])
def test_orientation_from_xmp_counts_where_exif_has_none(
    tmp_path: Path, kind: str, both: bool, without_pillow: None
) -> None:
    options = {"xmp": XMP % 6} | ({"exif": exif(1)} if both else {})
    path = write(tmp_path, encoded(kind, (50, 30), **options))
    assert image_size(path) == shown(path) == ((50, 30) if both else (30, 50))


@pytest.mark.parametrize("compressed", [False, True])
def test_orientation_from_xmp_in_a_png(tmp_path: Path, compressed: bool) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", (XMP % 8).decode(), zip=compressed)
    path = write(tmp_path, encoded("PNG", (50, 90), pnginfo=info))
    assert image_size(path) == shown(path) == (90, 50)


def test_orientation_after_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    content = encoded("PNG", (90, 120))
    block = exif(6).removeprefix(b"Exif\x00\x00")
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    path = write(tmp_path, content[:-12] + chunk + content[-12:])
    assert image_size(path) == shown(path) == (120, 90)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("PNG", "1", {}),
        ("PNG", "LA", {"icc_profile": bytes(9000)}),
        ("PNG", "RGBA", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "RGB", {"icc_profile": bytes(90000), "comment": b"x" * 5000}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"lossless": True}),
    ],
)
def test_modes_profiles_and_long_headers(
    tmp_path: Path, kind: str, mode: str, options: dict, without_pillow: None
) -> None:
    if mode == "I;16":
        buffer = io.BytesIO()
        Image.new("I;16", (211, 34), 40000).save(buffer, kind)
        content = buffer.getvalue()
    else:
        content = encoded(kind, (211, 34), mode, **options)
    assert image_size(write(tmp_path, content)) == (211, 34)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_animations_have_the_size_of_their_canvas(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (40, 20), color) for color in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    assert image_size(write(tmp_path, buffer.getvalue())) == (40, 20)


@pytest.mark.parametrize("kind", ["BMP", "AVIF", "TIFF"])
def test_other_formats_go_to_pillow_and_are_not_decoded(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "AVIF" and ".avif" not in headers.usable_extensions():
        pytest.skip("Pillow was built without AVIF")

    def refuse(self: ImageFile.ImageFile) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert image_size(write(tmp_path, encoded(kind, (64, 48)))) == (64, 48)


def test_the_content_decides_and_not_the_extension(tmp_path: Path) -> None:
    assert image_size(write(tmp_path, encoded("JPEG", (64, 48)), "wrong.png")) == (64, 48)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_found_out(tmp_path: Path, kind: str, share: float) -> None:
    content = encoded(kind, (300, 200))
    path = write(tmp_path, content[: int(len(content) * share)])
    with pytest.raises(BadImageError):
        image_size(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_file_whose_end_was_never_written_is_found_out(tmp_path: Path, kind: str) -> None:
    content = encoded(kind, (300, 200))
    half = len(content) // 2
    with pytest.raises(BadImageError):
        image_size(write(tmp_path, content[:half] + bytes(len(content) - half)))


def test_the_thumbnail_of_a_truncated_jpeg_does_not_make_it_whole(tmp_path: Path) -> None:
    block = Image.Exif()
    block[0x010E] = "x"
    thumbnail = encoded("JPEG", (160, 120), quality=20)
    content = encoded("JPEG", (64, 48), exif=block.tobytes() + thumbnail)
    scan = content.rindex(b"\xff\xda")
    with pytest.raises(BadImageError):
        image_size(write(tmp_path, content[: scan + 40]))


def test_data_after_the_end_of_a_jpeg_is_no_fault(tmp_path: Path) -> None:
    assert image_size(write(tmp_path, encoded("JPEG", (64, 48)) + bytes(10_000))) == (64, 48)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"not an image at all", "no image"), (b"\x89PNG\r\n\x1a\n", "no image|damaged")],
)
def test_what_is_no_image_is_named_so(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        image_size(write(tmp_path, content))


def test_a_missing_file_is_a_bad_image_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="can't be read"):
        image_size(str(tmp_path / "gone.png"))


def test_an_image_beyond_the_decoder_is_refused(tmp_path: Path) -> None:
    content = bytearray(encoded("PNG", (8, 8)))
    content[16:24] = struct.pack(">II", 40_000, 40_000)
    with pytest.raises(BadImageError, match="megapixels"):
        image_size(write(tmp_path, bytes(content)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_headers_give_a_size_or_a_bad_image_and_never_another_error(tmp_path_factory, data) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
    content = bytearray(encoded(kind, (40, 30), exif=exif(6)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.getbasetemp(), bytes(content), "damaged")
    try:
        width, height = image_size(path)
    except BadImageError:
        return
    assert width > 0
    assert height > 0
