"""A linked text is read where its target belongs to the dataset, and nowhere else: its words are published."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.common.errors import UserError
from library.data.dataset import DatasetIndex
from library.data.index import build_index
from library.data.settings import SubsetSettings
from tests.data.folders import dataset, image

SECRET = "a private key"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A collection of images with captions, and a secret, beside the dataset's folder."""
    (tmp_path / "dataset").mkdir()
    image(tmp_path / "all" / "cat.png")
    (tmp_path / "all" / "cat.txt").write_text("a cat", encoding="utf-8")
    (tmp_path / "all" / "cat.json").write_text('{"cat.png": {"caption": "a cat"}}', encoding="utf-8")
    (tmp_path / "secret").write_text(SECRET, encoding="utf-8")
    (tmp_path / "secret.txt").write_text(SECRET, encoding="utf-8")
    return tmp_path


def index(folder: Path, allow: bool = False, **values: object) -> DatasetIndex:
    subset = SubsetSettings("s", image_dir=folder, caption_extension=".txt", **values)
    return build_index([dataset(subset)], allow_external_links=allow)


def captions(folder: Path, allow: bool = False, **values: object) -> list[str]:
    return [record.caption for record in index(folder, allow, **values).training[0].records]


@pytest.mark.parametrize("target", ["secret", "secret.txt", "all/cat.txt"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_caption_that_links_elsewhere_is_a_problem(outside: Path, target: str, cached: bool):
    folder = outside / "dataset"
    image(folder / "0.png")
    (folder / "0.txt").symlink_to(outside / target)
    if cached:
        index(folder, allow=True, cache_info=True)
    with pytest.raises(UserError, match=r"0\.txt: the caption file is a link to .*--allow_external_links") as raised:
        index(folder, cache_info=cached)
    assert SECRET not in str(raised.value)
    assert captions(folder, allow=True) == ["a cat" if "cat" in target else SECRET]


def test_a_dataset_of_links_to_images_and_their_captions_is_read(outside: Path):
    folder = outside / "dataset"
    (folder / "0.png").symlink_to(outside / "all" / "cat.png")
    (folder / "0.txt").symlink_to(outside / "all" / "cat.txt")
    assert captions(folder) == ["a cat"]
    (outside / "linked").symlink_to(folder)
    assert captions(outside / "linked") == ["a cat"]
    (folder / "0.txt").unlink()
    (folder / "0.txt").symlink_to(outside / "all" / "cat.json")  # beside the image, but no caption
    with pytest.raises(UserError):
        index(folder)


def test_links_within_the_dataset_are_read(outside: Path):
    folder = outside / "dataset"
    image(folder / "0.png")
    (folder / "texts").mkdir()
    (folder / "texts" / "a").write_text("shared", encoding="utf-8")
    (folder / "0.txt").symlink_to("texts/a")
    assert captions(folder) == ["shared"]


def test_a_metadata_file_that_links_elsewhere_is_a_problem(outside: Path):
    folder = outside / "dataset"
    image(folder / "cat.png")
    (folder / "meta.json").symlink_to(outside / "all" / "cat.json")
    settings = dataset(SubsetSettings("s", image_dir=folder, metadata_file=folder / "meta.json"))
    with pytest.raises(UserError, match=r"the metadata file .* is a link to"):
        build_index([settings])
    (record,) = build_index([settings], allow_external_links=True).training[0].records
    assert record.caption == "a cat"
