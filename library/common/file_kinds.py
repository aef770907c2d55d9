"""What a file is, from its first bytes."""

from __future__ import annotations

_FIRST_BYTES = (
    (b"GGUF", "a GGUF file (quantised weights for other programs; use the .safetensors original)"),
    (b"PK\x03\x04", "a zip archive or a PyTorch .ckpt/.pt/.bin file"),
    (b"\x80\x02", "a pickle (an old PyTorch .ckpt/.pt/.bin file)"),
    (b"\x80\x03", "a pickle (an old PyTorch .ckpt/.pt/.bin file)"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself (run `git lfs pull`, or download the file)"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"%PDF", "a PDF"),
)


def kind_by_first_bytes(start: bytes) -> str | None:
    """What a file that begins with `start` (some hundred bytes) is; None where nothing known begins so."""
    for magic, kind in _FIRST_BYTES:
        if start.startswith(magic):
            return kind
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (a failed download: log in to the site, accept the licence, download again)"
    if text.startswith((b"{", b"[")):
        return "a JSON text"
    return None
