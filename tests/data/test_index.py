"""The index: what is found, and that bad input is named with its path, all at once, before anything is trained."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library.common.errors import UserError
from library.data import headers
from library.data.dataset import DatasetIndex, batch_count, table
from library.data.index import build_index, cycled
from library.data.settings import DatasetSettings
from tests.data.folders import dataset, folder, image, subset


def captions(index: DatasetIndex) -> dict[str, str]:
    return {Path(record.path).name: record.caption for record in index.training[0].records}


def problems(*datasets: DatasetSettings, **options: object) -> list[str]:
    with pytest.raises(UserError) as raised:
        build_index(list(datasets), **options)
    return raised.value.problems


# --- what is found ---


def test_records_hold_what_header_file_and_subset_say(tmp_path: Path) -> None:
    path = image(tmp_path / "a" / "wide.jpg", (200, 100), "a wide one\nsecond line")
    config = dataset(
        subset(tmp_path / "a", num_repeats=3), enable_bucket=True, min_bucket_reso=32, bucket_reso_steps=16
    )
    index = build_index([config])
    ((record,),) = [part.records for part in index.training]
    assert record.path == str(path)
    assert record.size == (200, 100)
    assert (record.file_size, record.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert record.caption == "a wide one"
    assert record.bucket == (80, 48)
    assert record.resized == (96, 48)
    assert (record.repeats, record.is_reg, record.loss_weight, record.mask_path) == (3, False, 1.0, None)
    assert index.training[0].subset_of(record) is config.subsets[0]
    assert index.training[0].buckets == {(80, 48): [0]}
    assert index.training[0].total_repeats == 3
    assert (index.validation, index.warnings) == ([], [])


def test_records_come_in_the_order_of_their_names_whatever_the_number_of_threads(tmp_path: Path) -> None:
    folder(tmp_path / "a", 600, (16, 16))
    one, many = (build_index([dataset(subset(tmp_path / "a"))], workers=workers) for workers in (1, 7))
    names = [Path(record.path).name for record in one.training[0].records]
    assert names == sorted(names)
    assert len(names) == 600
    assert one == many


def test_all_usable_extensions_in_any_case_are_found_and_others_are_passed_over(tmp_path: Path) -> None:
    for name in ["a.png", "b.PNG", "c.Jpg", "d.jpeg", "e.webp", "f.bmp"]:
        image(tmp_path / name, caption="x")
    image(tmp_path / "g.gif")
    image(tmp_path / "h.gif")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves beside a.png")
    (tmp_path / "sub").mkdir()
    image(tmp_path / "sub" / "i.png")
    index = build_index([dataset(subset(tmp_path))])
    assert sorted(captions(index)) == ["a.png", "b.PNG", "c.Jpg", "d.jpeg", "e.webp", "f.bmp"]
    assert any("2 .gif files are passed over" in warning for warning in index.warnings)


@pytest.mark.skipif(".avif" not in headers.usable_extensions(), reason="Pillow was built without AVIF")
def test_avif_is_found_where_pillow_can_read_it(tmp_path: Path) -> None:
    image(tmp_path / "a.avif", caption="x")
    assert list(captions(build_index([dataset(subset(tmp_path))]))) == ["a.avif"]


def test_exif_orientation_decides_the_bucket(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "a.jpg", (200, 100), "x", exif=exif.tobytes())
    config = dataset(subset(tmp_path), enable_bucket=True, min_bucket_reso=32, bucket_reso_steps=16)
    (record,) = build_index([config]).training[0].records
    assert record.size == (100, 200)
    assert record.bucket == (48, 80)


@pytest.mark.parametrize(
    "name", ["[a] (b) {c} *?" if sys.platform != "win32" else "[a] (b) {c}", "猫の写真 ё 🐈", "a b"]
)
def test_brackets_and_unicode_in_names(tmp_path: Path, name: str) -> None:
    path = image(tmp_path / name / f"{name}.png", caption=name)
    (record,) = build_index([dataset(subset(tmp_path / name))]).training[0].records
    assert record.path == str(path)
    assert record.caption == name.strip()


def test_a_size_is_not_taken_from_a_file_whose_name_begins_alike(tmp_path: Path) -> None:
    image(tmp_path / "a.png", (64, 32), "x")
    image(tmp_path / "ab.png", (32, 64), "y")
    (tmp_path / "ab_0768x0512_sd3.npz").write_bytes(b"")
    sizes = {Path(r.path).name: r.size for r in build_index([dataset(subset(tmp_path))]).training[0].records}
    assert sizes == {"a.png": (64, 32), "ab.png": (32, 64)}


# --- captions ---


def test_caption_files_in_every_allowed_form(tmp_path: Path) -> None:
    files = {
        "bom": b"\xef\xbb\xbfwith a mark",
        "crlf": b"first\r\nsecond\r\n",
        "blank": b"\n \n  the third line  \n",
        "unicode": "猫, ねこ".encode(),
    }
    for stem, content in files.items():
        image(tmp_path / f"{stem}.png").with_suffix(".txt").write_bytes(content)
    image(tmp_path / "face_1_2_3_4.png")
    (tmp_path / "face.txt").write_text("a face")
    index = build_index([dataset(subset(tmp_path))])
    assert captions(index) == {
        "blank.png": "the third line",
        "bom.png": "with a mark",
        "crlf.png": "first",
        "face_1_2_3_4.png": "a face",
        "unicode.png": "猫, ねこ",
    }


def test_with_wildcards_all_lines_are_kept(tmp_path: Path) -> None:
    image(tmp_path / "a.png", caption="one\n\n two \nthree\n")
    assert captions(build_index([dataset(subset(tmp_path, captions={"enable_wildcard": True}))])) == {
        "a.png": "one\ntwo\nthree"
    }


def test_an_empty_caption_file_is_an_empty_caption_with_a_warning(tmp_path: Path) -> None:
    image(tmp_path / "a.png", caption="  \n")
    index = build_index([dataset(subset(tmp_path, class_tokens="cat"))])
    assert captions(index) == {"a.png": ""}
    assert any("empty caption" in warning and "a.txt" in warning for warning in index.warnings)


@pytest.mark.parametrize(("class_tokens", "caption"), [("a cat", "a cat"), (None, "")])
def test_without_a_caption_file_the_class_tokens_count(tmp_path: Path, class_tokens: str | None, caption: str) -> None:
    image(tmp_path / "a.png")
    index = build_index([dataset(subset(tmp_path, class_tokens=class_tokens))])
    assert captions(index) == {"a.png": caption}
    assert any("a.png" in warning and "no .txt file" in warning for warning in index.warnings)


def test_two_images_of_one_stem_share_the_caption_with_a_warning(tmp_path: Path) -> None:
    image(tmp_path / "a.png", caption="shared")
    image(tmp_path / "a.jpg")
    index = build_index([dataset(subset(tmp_path))])
    assert captions(index) == {"a.jpg": "shared", "a.png": "shared"}
    assert any("a.png" in warning and "another extension" in warning for warning in index.warnings)


def test_captions_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    image(tmp_path / "a.png").with_suffix(".txt").write_bytes("café".encode("latin-1"))
    image(tmp_path / "b.png").with_suffix(".txt").write_bytes("cat".encode("utf-16"))
    image(tmp_path / "c.png", caption="good")
    (problem,) = problems(dataset(subset(tmp_path)))
    assert f"{tmp_path / 'a.txt'}: the caption file is not UTF-8 (byte 0xe9 at position 3)" in problem
    assert f"{tmp_path / 'b.txt'}: the caption file is UTF-16" in problem
    index = build_index([dataset(subset(tmp_path))], skip_bad_images=True)
    assert captions(index) == {"c.png": "good"}
    assert any("a.txt" in warning and "b.txt" in warning for warning in index.warnings)


# --- bad images (row 30) ---


def make_bad_images(path: Path) -> dict[str, str]:
    """One good image and many bad ones; what is told about each bad one."""
    image(path / "good.png", caption="good")
    (path / "zero.png").write_bytes(b"")
    (path / "text.jpg").write_text("this is no image")
    whole = image(path / "cut.png", (100, 100)).read_bytes()
    (path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (path / "cut_header.png").write_bytes(whole[:20])
    whole = image(path / "cut.jpg", (100, 100)).read_bytes()
    (path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    image(path / "dot.png", (1, 1))
    Image.new("1", (30_000, 20)).save(path / "strip.png")
    return {
        "zero.png": "the file is empty",
        "text.jpg": "no image that can be read",
        "cut.png": "damaged or truncated",
        "cut_header.png": "damaged",
        "cut.jpg": "truncated",
        "dot.png": "1x1 is too small",
        "strip.png": "30000x20 is too long",
    }


def test_all_bad_images_are_listed_together_with_their_paths(tmp_path: Path) -> None:
    expected = make_bad_images(tmp_path)
    (problem,) = problems(dataset(subset(tmp_path)))
    assert problem.startswith(f"{len(expected)} files can't be used")
    assert "--skip_bad_images" in problem
    lines = problem.split("\n")[1:]
    assert len(lines) == len(expected)
    for name, reason in expected.items():
        assert any(line.startswith(f"  {tmp_path / name}: ") and reason in line for line in lines), (name, lines)


def test_skip_bad_images_trains_on_the_rest_and_says_what_is_left_out(tmp_path: Path) -> None:
    expected = make_bad_images(tmp_path)
    index = build_index([dataset(subset(tmp_path))], skip_bad_images=True)
    assert captions(index) == {"good.png": "good"}
    (warning,) = [warning for warning in index.warnings if "left out" in warning]
    assert all(str(tmp_path / name) in warning for name in expected)


def test_images_of_unusual_kinds_are_indexed(tmp_path: Path) -> None:
    Image.new("CMYK", (64, 48)).save(tmp_path / "cmyk.jpg")
    Image.new("I;16", (64, 48), 1000).save(tmp_path / "sixteen.png")
    Image.new("P", (64, 48)).save(tmp_path / "palette.png", transparency=0)
    frames = [Image.new("RGB", (64, 48), color) for color in ("red", "green")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    index = build_index([dataset(subset(tmp_path))])
    assert [record.size for record in index.training[0].records] == [(64, 48)] * 5


def test_all_problems_of_all_datasets_are_told_at_once(tmp_path: Path) -> None:
    folder(tmp_path / "a", 1)
    (tmp_path / "a" / "bad.png").write_bytes(b"")
    gone, metadata = subset(tmp_path / "gone"), tmp_path / "meta.json"
    metadata.write_text("{")
    from library.data.settings import SubsetSettings

    found = problems(
        dataset(subset(tmp_path / "a"), gone), dataset(gone, SubsetSettings("m", metadata_file=metadata), name="two")
    )
    assert len(found) == 3
    assert str(tmp_path / "gone") in found[0]
    assert "meta.json" in found[1]
    assert "bad.png" in found[2]


def test_a_missing_folder_is_named_once_though_two_datasets_want_it(tmp_path: Path) -> None:
    config = dataset(subset(tmp_path / "gone"))
    assert len([problem for problem in problems(config, config) if "gone" in problem]) == 1


def test_a_file_in_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (problem,) = problems(dataset(subset(tmp_path / "file")))
    assert "can't be read" in problem


def test_an_empty_folder_is_a_warning_and_no_image_at_all_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "a", 1)
    index = build_index([dataset(subset(tmp_path / "empty"), subset(tmp_path / "a"))])
    assert any("no image" in warning for warning in index.warnings)
    (problem,) = problems(dataset(subset(tmp_path / "empty")))
    assert "no images to train on" in problem


def link(path: Path, target: Path | str, folder: bool = False) -> None:
    try:
        path.symlink_to(target, target_is_directory=folder)
    except (OSError, NotImplementedError):
        pytest.skip("no symbolic links here")


def test_links_that_lead_nowhere_or_in_circles_are_named(tmp_path: Path) -> None:
    image(tmp_path / "good.png", caption="x")
    link(tmp_path / "broken.png", "gone.png")
    link(tmp_path / "loop.png", "loop.png")
    link(tmp_path / "circle", tmp_path, folder=True)
    (problem,) = problems(dataset(subset(tmp_path)))
    assert "broken.png" in problem
    assert "loop.png" in problem
    assert "circle" not in problem


def test_an_image_folder_that_links_to_itself_is_named(tmp_path: Path) -> None:
    link(tmp_path / "loop", "loop", folder=True)
    (problem,) = problems(dataset(subset(tmp_path / "loop")))
    assert "loop" in problem


def test_links_to_images_and_folders_are_followed(tmp_path: Path) -> None:
    folder(tmp_path / "real", 2)
    link(tmp_path / "linked", "real", folder=True)
    index = build_index([dataset(subset(tmp_path / "linked"))])
    assert len(index.training[0].records) == 2


# --- masks ---


def mask_subset(tmp_path: Path, **values: object):
    return subset(tmp_path / "images", conditioning_data_dir=tmp_path / "masks", **values)


def test_each_image_gets_the_mask_of_its_stem(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.jpg", (64, 48), "x")
    image(tmp_path / "images" / "ab.png", (48, 64), "y")
    image(tmp_path / "masks" / "a.png", (64, 48))
    image(tmp_path / "masks" / "ab.png", (48, 64))
    (one, two) = build_index([dataset(mask_subset(tmp_path))]).training[0].records
    assert (one.mask_path, two.mask_path) == (str(tmp_path / "masks" / "a.png"), str(tmp_path / "masks" / "ab.png"))


def test_missing_extra_double_and_wrongly_sized_masks_are_all_named(tmp_path: Path) -> None:
    for stem in ["missing", "size", "double", "bad"]:
        image(tmp_path / "images" / f"{stem}.png", caption="x")
    for name in ["extra.png", "double.png", "double.jpg"]:
        image(tmp_path / "masks" / name)
    image(tmp_path / "masks" / "size.png", (32, 64))
    (tmp_path / "masks" / "bad.png").write_bytes(b"")
    found = problems(dataset(mask_subset(tmp_path)))
    for expected in [
        "missing.png has no mask",
        "extra.png belongs to no image",
        "two masks of one stem",
        "is 32x64, but its image is 64x64",
        f"{tmp_path / 'masks' / 'bad.png'}: the file is empty",
    ]:
        assert sum(expected in problem for problem in found) == 1, (expected, found)
    assert len(found) == 5


def test_subsets_may_share_a_folder_of_masks(tmp_path: Path) -> None:
    for name in ["a", "b"]:
        image(tmp_path / name / f"{name}.png", caption="x")
        image(tmp_path / "masks" / f"{name}.png")
    shared = [subset(tmp_path / name, conditioning_data_dir=tmp_path / "masks") for name in ["a", "b"]]
    records = build_index([dataset(*shared)]).training[0].records
    assert [record.mask_path for record in records] == [str(tmp_path / "masks" / f"{name}.png") for name in ["a", "b"]]
    image(tmp_path / "masks" / "c.png")
    (problem,) = problems(dataset(*shared))
    assert "c.png belongs to no image" in problem


def test_an_image_with_a_bad_mask_is_skipped_and_not_trained_without_a_mask(tmp_path: Path) -> None:
    for stem in ["good", "bad"]:
        image(tmp_path / "images" / f"{stem}.png", caption="x")
        image(tmp_path / "masks" / f"{stem}.png")
    (tmp_path / "masks" / "bad.png").write_bytes(b"")
    (tmp_path / "images" / "worse.png").write_bytes(b"")
    image(tmp_path / "masks" / "worse.png")
    index = build_index([dataset(mask_subset(tmp_path))], skip_bad_images=True)
    assert list(captions(index)) == ["good.png"]


# --- regularisation ---


@pytest.mark.parametrize(
    ("repeats", "wanted", "result"),
    [
        ([1, 1, 1], 3, [1, 1, 1]),
        ([1, 1, 1], 8, [3, 3, 2]),
        ([2, 2], 3, [2, 1]),
        ([1, 1, 1], 2, [1, 1, 0]),
        ([5], 20, [20]),
        ([], 20, []),
        ([3, 1], 0, [0, 0]),
    ],
)
def test_regularisation_repeats_sum_to_what_is_wanted(repeats: list[int], wanted: int, result: list[int]) -> None:
    assert cycled(repeats, wanted) == result
    assert not result or sum(result) == wanted


def test_regularisation_images_are_as_many_as_the_others_and_carry_the_prior_loss_weight(tmp_path: Path) -> None:
    folder(tmp_path / "own", 4)
    folder(tmp_path / "reg", 3)
    config = dataset(
        subset(tmp_path / "own", num_repeats=5), subset(tmp_path / "reg", is_reg=True, loss_weight=0.5), batch_size=4
    )
    (made,) = build_index([config]).training
    by_kind = {kind: [r for r in made.records if r.is_reg is kind] for kind in (False, True)}
    assert sum(record.repeats for record in by_kind[False]) == 20
    assert [record.repeats for record in by_kind[True]] == [7, 7, 6]
    assert {record.loss_weight for record in by_kind[True]} == {0.5}
    assert {record.loss_weight for record in by_kind[False]} == {1.0}


def test_regularization_images_that_are_too_many_are_counted_in_a_warning(tmp_path: Path) -> None:
    folder(tmp_path / "own", 2)
    folder(tmp_path / "reg", 7)
    made = dataset(subset(tmp_path / "own", num_repeats=2), subset(tmp_path / "reg", is_reg=True))
    (warning,) = [text for text in build_index([made]).warnings if "regularization" in text]
    assert "3 of 7 regularization images are not used" in warning and "training images × repeats, 4" in warning
    made = dataset(subset(tmp_path / "own", num_repeats=4), subset(tmp_path / "reg", is_reg=True))
    assert not [text for text in build_index([made]).warnings if "regularization" in text]


def test_regularisation_alone_is_no_dataset(tmp_path: Path) -> None:
    folder(tmp_path / "reg", 3)
    (problem,) = problems(dataset(subset(tmp_path / "reg", is_reg=True)))
    assert "no images to train on" in problem


# --- several datasets ---


def test_one_folder_at_several_resolutions_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "a", 3)
    from library.data import scan

    read: list[str] = []
    monkeypatch.setattr(scan, "image_size", lambda path: read.append(path) or headers.image_size(path))
    index = build_index(
        [
            dataset(subset(tmp_path / "a"), resolution=(64, 64)),
            dataset(subset(tmp_path / "a", num_repeats=2), resolution=(128, 128), name="dataset 2"),
        ]
    )
    assert len(read) == 3
    assert [made.records[0].bucket for made in index.training] == [(64, 64), (128, 128)]
    assert [made.records[0].repeats for made in index.training] == [1, 2]


# --- the table ---


def test_the_table_counts_images_repeats_and_batches_of_each_bucket(tmp_path: Path) -> None:
    folder(tmp_path / "a", 5, (64, 64))
    for number in range(3):
        image(tmp_path / "a" / f"wide{number}.png", (128, 64), "x")
    config = dataset(
        subset(tmp_path / "a", num_repeats=3),
        enable_bucket=True,
        min_bucket_reso=32,
        bucket_reso_steps=16,
        batch_size=4,
    )
    index = build_index([config])
    assert [line.split() for line in table(index).split("\n")[1:]] == [
        ["bucket", "images", "repeats", "batches"],
        ["64x64", "5", "15", "4"],
        ["80x48", "3", "9", "3"],
        ["total", "8", "24", "7"],
    ]
    assert batch_count(index.training[0]) == 7
    assert "dataset 1, training: resolution 64x64, batch size 4" in table(index)


def test_the_index_does_not_import_torch_or_decode_pixels(tmp_path: Path) -> None:
    import subprocess

    folder(tmp_path / "a", 3)
    code = (
        "import sys\nfrom pathlib import Path\nfrom PIL import ImageFile\n"
        "def refuse(self): raise AssertionError('pixels were decoded')\n"
        "ImageFile.ImageFile.load = refuse\n"
        "from library.data.index import build_index\nfrom library.data.settings import *\n"
        f"subset = SubsetSettings('a', image_dir=Path({str(tmp_path / 'a')!r}))\n"
        "build_index([DatasetSettings('d', (subset,), (64, 64))])\n"
        "assert 'torch' not in sys.modules\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})


def test_captions_with_another_extension_are_pointed_out(tmp_path: Path) -> None:
    own = subset(folder(tmp_path / "own", 2))
    default = dataset(replace(own, caption_extension=".caption"))
    (warning,) = [text for text in build_index([default]).warnings if "have no" in text]
    assert warning.endswith("2 of them have a .txt file: is --caption_extension .txt what you want?")
    assert not [text for text in build_index([dataset(own)]).warnings if "have no" in text]
