"""The index cache: nothing is read twice, and nothing stale is believed (row 26)."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from library.data import folder_scan, headers, index_cache, scan
from library.data.index import build_index
from library.data.index_cache import FILE_NAME
from library.data.settings import DatasetSettings, SubsetSettings
from tests.data.folders import age, dataset, folder, image, subset


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all images and captions that are opened."""
    names: list[str] = []
    caption_text = folder_scan.caption_text
    monkeypatch.setattr(scan, "image_size", lambda path: names.append(Path(path).name) or headers.image_size(path))
    monkeypatch.setattr(
        folder_scan, "caption_text", lambda content: names.append(content.decode()) or caption_text(content)
    )
    return names


def cached(path: Path) -> DatasetSettings:
    return dataset(subset(path, cache_info=True))


def test_a_second_run_opens_nothing_and_gives_the_same_index(tmp_path: Path, opened: list[str]) -> None:
    age(folder(tmp_path, 4))
    first = build_index([cached(tmp_path)])
    assert len(opened) == 8
    opened.clear()
    assert build_index([cached(tmp_path)]) == first
    assert opened == []


def test_without_cache_info_nothing_is_written(tmp_path: Path) -> None:
    age(folder(tmp_path, 2))
    build_index([dataset(subset(tmp_path))])
    assert not list(tmp_path.glob("*.json"))


def test_new_changed_and_removed_files_are_seen_at_once_and_the_rest_is_not_read_again(
    tmp_path: Path, opened: list[str]
) -> None:
    age(folder(tmp_path, 5))
    build_index([cached(tmp_path)])
    opened.clear()
    image(tmp_path / "new.png", (32, 64), "a new one")
    image(tmp_path / "001.png", (48, 64))
    (tmp_path / "002.txt").write_text("an edited caption")
    (tmp_path / "003.png").unlink()
    (tmp_path / "004.txt").unlink()
    made = build_index([cached(tmp_path)]).training[0]
    found = {Path(record.path).name: (record.size, record.caption) for record in made.records}
    assert found == {
        "000.png": ((64, 64), "caption of 000"),
        "001.png": ((48, 64), "caption of 001"),
        "002.png": ((64, 64), "an edited caption"),
        "004.png": ((64, 64), ""),
        "new.png": ((32, 64), "a new one"),
    }
    assert sorted(opened) == ["001.png", "a new one", "an edited caption", "new.png"]


def test_an_edit_of_the_same_length_right_after_the_run_is_seen(tmp_path: Path) -> None:
    image(tmp_path / "a.png", caption="old")
    build_index([cached(tmp_path)])
    stamp = (tmp_path / "a.txt").stat().st_mtime_ns
    (tmp_path / "a.txt").write_text("new")
    os.utime(tmp_path / "a.txt", ns=(stamp, stamp))  # as a file system with coarse times would leave it
    assert build_index([cached(tmp_path)]).training[0].records[0].caption == "new"


def test_enabling_wildcards_later_finds_all_lines(tmp_path: Path) -> None:
    image(tmp_path / "a.png", caption="one\ntwo")
    age(tmp_path)
    assert build_index([cached(tmp_path)]).training[0].records[0].caption == "one"
    with_wildcards = dataset(subset(tmp_path, cache_info=True, captions={"enable_wildcard": True}))
    assert build_index([with_wildcards]).training[0].records[0].caption == "one\ntwo"


def test_the_cache_works_with_a_validation_split(tmp_path: Path, opened: list[str]) -> None:
    """The original stored the training part alone and then paired captions with other images."""
    age(folder(tmp_path, 20))
    config = dataset(subset(tmp_path, cache_info=True), validation_split=0.25)
    first = build_index([config], seed=1)
    opened.clear()
    again = build_index([config], seed=1)
    assert again == first
    assert opened == []
    for made in [*again.training, *again.validation]:
        assert all(record.caption == f"caption of {Path(record.path).stem}" for record in made.records)


def test_bad_images_are_not_remembered_as_good(tmp_path: Path) -> None:
    age(folder(tmp_path, 2))
    (tmp_path / "000.png").write_bytes(b"")
    age(tmp_path)
    for _ in range(2):
        index = build_index([cached(tmp_path)], skip_bad_images=True)
        assert [Path(record.path).name for record in index.training[0].records] == ["001.png"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\x00",
        b'{"version": 99}',
        b'{"version": 1}',
        b'{"version": 1, "image": ["a"], "image_bytes": [], "image_mtime": [], "width": [], "height": []}',
        b'{"/some/a.png": {"caption": "of the original", "resolution": [1, 2]}}',
    ],
)
def test_a_damaged_or_foreign_cache_is_made_anew(tmp_path: Path, content: bytes, opened: list[str]) -> None:
    age(folder(tmp_path, 2))
    (tmp_path / FILE_NAME).write_bytes(content)
    assert len(build_index([cached(tmp_path)]).training[0].records) == 2
    opened.clear()
    build_index([cached(tmp_path)])
    assert opened == []


def test_a_cache_dir_keeps_the_caches_of_several_folders_apart_and_out_of_the_folders(
    tmp_path: Path, opened: list[str]
) -> None:
    age(folder(tmp_path / "a", 2, (64, 64)))
    age(folder(tmp_path / "b", 2, (32, 64)))
    config = dataset(subset(tmp_path / "a"), subset(tmp_path / "b"))
    first = build_index([config], cache_dir=tmp_path / "caches")
    assert len(list((tmp_path / "caches").iterdir())) == 2
    assert not list(tmp_path.glob("?/*.json"))
    opened.clear()
    assert build_index([config], cache_dir=tmp_path / "caches") == first
    assert opened == []


def test_a_folder_that_cannot_be_written_to_is_indexed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    age(folder(tmp_path, 2))

    def refuse(path: Path, text: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(index_cache, "write_text", refuse)
    assert len(build_index([cached(tmp_path)]).training[0].records) == 2
    assert "can't be written" in caplog.text


def test_a_full_disk_leaves_no_part_of_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    age(folder(tmp_path, 2))

    def full(path: Path, text: str, encoding: str) -> None:
        with path.open("w", encoding=encoding) as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(Path, "write_text", full)
    assert len(build_index([cached(tmp_path)]).training[0].records) == 2
    assert "No space left on device" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_names_outside_of_unicode_survive_the_cache(tmp_path: Path, opened: list[str]) -> None:
    try:
        image(tmp_path / "fine.png", caption="x").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    except OSError:
        pytest.skip("the file system takes Unicode names alone")
    age(tmp_path)
    first = build_index([cached(tmp_path)])
    opened.clear()
    assert build_index([cached(tmp_path)]) == first
    assert opened == []


def test_the_sizes_of_metadata_images_and_masks_are_cached_too(tmp_path: Path, opened: list[str]) -> None:
    folder(tmp_path / "images", 2)
    folder(tmp_path / "masks", 2, captions=False)
    metadata = tmp_path / "meta.json"
    metadata.write_text(json.dumps({f"{number:03d}.png": {"caption": "x"} for number in range(2)}))
    age(tmp_path)
    named = SubsetSettings("m", image_dir=tmp_path / "images", metadata_file=metadata, cache_info=True)
    masked = subset(tmp_path / "images", conditioning_data_dir=tmp_path / "masks", cache_info=True)
    config = [dataset(named), dataset(masked, name="dataset 2")]
    first = build_index(config)
    assert (tmp_path / f"meta.json.{FILE_NAME}").exists()
    opened.clear()
    assert build_index(config) == first
    assert opened == []


def test_fresh_files_are_written_to_the_cache_once_they_have_settled(tmp_path: Path, opened: list[str]) -> None:
    folder(tmp_path, 2)
    now = time.time_ns()
    build_index([cached(tmp_path)])
    stamps = json.loads((tmp_path / FILE_NAME).read_text())["image_mtime"]
    assert all(stamp < now - 10**9 for stamp in stamps)
    age(tmp_path)
    build_index([cached(tmp_path)])
    assert len(json.loads((tmp_path / FILE_NAME).read_text())["image"]) == 2
