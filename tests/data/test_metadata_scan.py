"""Metadata files: captions and tags from JSON and JSONL, images within their folder, and every fault with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.common.errors import UserError
from library.data.index import build_index
from library.data.settings import CaptionSettings, SubsetSettings
from tests.data.folders import dataset, folder, image


def metadata_subset(path: Path, image_dir: Path | None, **values: object) -> SubsetSettings:
    captions = CaptionSettings(**values.pop("captions", {}))
    return SubsetSettings("meta", image_dir=image_dir, metadata_file=path, captions=captions, **values)


def write(path: Path, table: dict[str, dict]) -> Path:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"image_path": image, **fields}) for image, fields in table.items()]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8-sig")
    else:
        path.write_text(json.dumps(table), encoding="utf-8")
    return path


def captions(subset: SubsetSettings) -> dict[str, str]:
    return {Path(record.path).name: record.caption for record in build_index([dataset(subset)]).training[0].records}


def problems(subset: SubsetSettings) -> list[str]:
    with pytest.raises(UserError) as raised:
        build_index([dataset(subset)])
    return raised.value.problems


@pytest.mark.parametrize("extension", [".json", ".jsonl"])
def test_captions_and_tags_are_joined_by_the_separator(tmp_path: Path, extension: str) -> None:
    folder(tmp_path / "i", 5)
    image(tmp_path / "i" / "sub" / "deep.png")
    table = {
        "000.png": {"caption": "a cat", "tags": "red; blue", "image_size": [64, 64], "more": 1},
        "001.png": {"caption": "a cat\nsecond"},
        "002.png": {"tags": "red"},
        "003.png": {},
        "sub/deep.png": {"caption": "deep"},
    }
    made = metadata_subset(
        write(tmp_path / f"m{extension}", table), tmp_path / "i", captions={"caption_separator": ";"}
    )
    assert captions(made) == {
        "000.png": "a cat; red; blue",
        "001.png": "a cat",
        "002.png": "red",
        "003.png": "",
        "deep.png": "deep",
    }
    assert any("003.png" in warning and "empty" in warning for warning in build_index([dataset(made)]).warnings)


def test_with_wildcards_the_tags_go_to_every_line(tmp_path: Path) -> None:
    folder(tmp_path, 1)
    path = write(tmp_path / "m.json", {"000.png": {"caption": "one\n\ntwo", "tags": "t"}})
    assert captions(metadata_subset(path, tmp_path, captions={"enable_wildcard": True})) == {
        "000.png": "one, t\ntwo, t"
    }


def test_paths_may_be_absolute_or_begin_with_the_folder_or_lack_the_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "i", 3)
    monkeypatch.chdir(tmp_path)
    table = {str(tmp_path / "i" / "000.png"): {}, "i/001.png": {}, "002": {}}
    path = write(tmp_path / "m.json", table)
    assert sorted(captions(metadata_subset(path, Path("i")))) == ["000.png", "001.png", "002.png"]


def test_absolute_paths_need_no_folder(tmp_path: Path) -> None:
    one = image(tmp_path / "a" / "x.png")
    two = image(tmp_path / "b" / "y.png")
    path = write(tmp_path / "m.json", {str(one): {"caption": "1"}, str(two): {"caption": "2"}})
    assert captions(metadata_subset(path, None)) == {"x.png": "1", "y.png": "2"}


@pytest.mark.parametrize("escape", ["../secret.png", "sub/../../secret.png", "absolute"])
def test_paths_cannot_leave_their_folder(tmp_path: Path, escape: str) -> None:
    secret = image(tmp_path / "secret.png")
    folder(tmp_path / "i", 1)
    image(tmp_path / "i2" / "beside.png")
    name = str(secret) if escape == "absolute" else escape
    path = write(tmp_path / "m.json", {"000.png": {}, name: {}, "../i2/beside.png": {}})
    found = problems(metadata_subset(path, tmp_path / "i"))
    assert len(found) == 2
    assert all("leads out of image_dir" in problem for problem in found)


def test_relative_paths_without_a_folder_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", {"000.png": {}})
    (problem,) = problems(metadata_subset(path, None))
    assert "needs image_dir" in problem


def test_images_that_are_not_there_are_listed_as_bad(tmp_path: Path) -> None:
    folder(tmp_path, 1)
    path = write(tmp_path / "m.json", {"000.png": {}, "gone.png": {}})
    (problem,) = problems(metadata_subset(path, tmp_path))
    assert "gone.png: does not exist" in problem
    index = build_index([dataset(metadata_subset(path, tmp_path))], skip_bad_images=True)
    assert len(index.training[0].records) == 1


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("m.json", "{", "m.json: Expecting"),
        ("m.json", "[]", "must hold one object"),
        ("m.json", '{"000.png": "caption"}', 'key "000.png": an entry must be an object'),
        ("m.json", '{"000.png": {"caption": 3}}', 'key "000.png": caption and tags must be text'),
        ("m.json", '{"000.png": {"image_size": [1]}}', 'key "000.png": image_size must be [width, height]'),
        ("m.json", '{"000.png": {"image_size": "64x64"}}', "image_size must be"),
        ("m.jsonl", '{"image_path": "000.png"}\n{oops}', "line 2: "),
        ("m.jsonl", '{"caption": "x"}', 'line 1: an entry must be an object, with an "image_path"'),
        ("m.jsonl", '{"image_path": 5}', "line 1: an entry must be"),
        ("m.jsonl", "3", "line 1: an entry must be"),
        ("m.json", '{"nul\\u0000.png": {}}', "NUL character"),
        ("m.jsonl", "[" * 100_000, "line 1: it is nested too deeply"),
    ],
)
def test_faults_are_told_with_their_place(tmp_path: Path, name: str, content: str, told: str) -> None:
    folder(tmp_path, 1)
    path = tmp_path / name
    path.write_text(content)
    found = problems(metadata_subset(path, tmp_path))
    assert any(told in problem for problem in found), found


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    assert "can't be read" in problems(metadata_subset(tmp_path / "gone.json", tmp_path))[0]
    (tmp_path / "m.json").write_bytes(b'{"caf\xe9.png": {}}')
    assert "not UTF-8" in problems(metadata_subset(tmp_path / "m.json", tmp_path))[0]


def test_an_image_named_twice_and_a_wrong_size_are_warnings(tmp_path: Path) -> None:
    image(tmp_path / "a.png", (64, 32))
    image(tmp_path / "b.png", (64, 32))
    lines = [
        {"image_path": "a.png", "caption": "first", "image_size": [100, 100]},
        {"image_path": "./a.png", "caption": "second"},
        {"image_path": "b.png", "caption": "turned", "image_size": [32, 64]},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    made = metadata_subset(path, tmp_path)
    assert captions(made) == {"a.png": "first", "b.png": "turned"}
    warnings = build_index([dataset(made)]).warnings
    assert any("named twice" in warning for warning in warnings)
    (wrong,) = [warning for warning in warnings if "image_size" in warning]
    assert "a.png" in wrong
    assert "b.png" not in wrong


def test_an_empty_metadata_file_is_no_dataset(tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", {})
    assert "no images to train on" in problems(metadata_subset(path, tmp_path))[0]
