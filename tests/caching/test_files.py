"""Cache files are found quickly under names that fit any file system, and what the disk refuses is told in words."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, strategies as st

from library.caching import files as cache_files
from library.caching.files import cache_path, missing_files, read_cache_key, write_cache
from library.common.errors import UserError

TENSORS = {"latents": torch.zeros(16, 32, 32)}
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\"), min_size=1, max_size=120)


@given(a=NAMES, b=NAMES, folder=st.sampled_from([None, "/cache"]))
def test_any_names_fit_a_file_system_and_stay_apart(a: str, b: str, folder: str | None):
    """255 bytes are allowed; the file that is being written has 14 more than the last one."""
    paths = [
        cache_path(f"/images/{name}.png", "1024x1024-abcdef.latents", folder and Path(folder)) for name in (a, a * 3, b)
    ]
    for path in paths:
        assert len(os.fsencode(path.name)) + 14 <= 255 and path.name.endswith(".1024x1024-abcdef.latents.safetensors")
    assert len(set(paths)) == len({a, a * 3, b})


def test_an_image_with_the_longest_possible_name_is_cached(tmp_path: Path):
    for folder in (None, tmp_path / "cache"):
        path = cache_path(str(tmp_path / ("é" * 125 + ".png")), "64x64.latents", folder)
        write_cache(path, TENSORS, {"vae": "x"})
        assert read_cache_key(path) == {"format": cache_files.FORMAT, "vae": "x"}


def test_images_of_one_name_in_two_folders_stay_apart_in_cache_dir(tmp_path: Path):
    one, other = (cache_path(f"/{folder}/a.png", "text", tmp_path) for folder in ("x", "y"))
    assert one != other and one.parent == other.parent == tmp_path


def test_folders_are_listed_once_and_only_files_that_are_there_are_opened(tmp_path: Path, monkeypatch):
    paths = [tmp_path / f"{folder}" / f"{number}.safetensors" for folder in "ab" for number in range(1500)]
    for path in paths[::3]:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    listed, opened = [], []
    plain = os.scandir
    monkeypatch.setattr(cache_files.os, "scandir", lambda folder: listed.append(folder) or plain(folder))
    stale = set(paths[::30])

    def is_fresh(path: Path) -> bool:
        opened.append(path)
        return path not in stale

    found = missing_files([*paths, tmp_path / "no folder" / "c"], lambda path: path, is_fresh)
    assert found == [*(p for n, p in enumerate(paths) if n % 3 or p in stale), tmp_path / "no folder" / "c"]
    assert sorted(opened) == sorted(paths[::3]) and len(listed) == 3
    opened.clear()
    assert missing_files(paths, lambda path: path, None) == [p for n, p in enumerate(paths) if n % 3] and not opened


def test_the_librarys_own_error_of_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch):
    """safetensors doesn't raise OSError; these are its words on a full tmpfs."""

    def full(tensors, path, metadata=None):
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
            if os.name == "posix"
            else "Error while serializing: I/O error: There is not enough space on the disk. (os error 112)"
        )

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_cache(tmp_path / "a.safetensors", TENSORS, {})
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_library_that_is_no_disks_fault_stays_a_bug(tmp_path: Path, monkeypatch):
    def broken(tensors, path, metadata=None):
        raise safetensors.SafetensorError("InvalidHeader")

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    with pytest.raises(safetensors.SafetensorError):
        write_cache(tmp_path / "a.safetensors", TENSORS, {})


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX's")
def test_a_write_that_the_system_really_refuses_is_told_and_leaves_nothing(tmp_path: Path):
    """No stand-in: the kernel refuses files above 4096 bytes, in the middle of the library's writing."""
    import resource

    old, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError) as told:
            write_cache(tmp_path / "a.safetensors", TENSORS, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (old, hard))
    assert "--cache_dir" in str(told.value) and os.strerror(errno.EFBIG) in str(told.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"])
def test_files_of_others_are_nobodys_cache(tmp_path: Path, content: bytes):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert read_cache_key(path) is None
    safetensors.torch.save_file(TENSORS, path, {"made_from": "[1]"})
    assert read_cache_key(path) is None


def test_a_cut_cache_file_is_no_cache(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    write_cache(path, TENSORS, {"vae": "x"})
    path.write_bytes(path.read_bytes()[:-10])
    assert read_cache_key(path) is None
