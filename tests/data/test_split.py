"""The validation split: never an image on both sides, the same on every run, and nothing random in validation (row 25)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from library.common.errors import UserError
from library.data.captions import CaptionPipeline, is_random
from library.data.dataset import DatasetIndex
from library.data.index import build_index
from library.data.settings import DatasetSettings, SubsetSettings
from library.data.split import held_out
from tests.data.folders import dataset, folder, image, subset

NAMES = st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=60)


def names(index: DatasetIndex) -> tuple[set[str], set[str]]:
    """The resolved paths of training and of validation images."""
    both = []
    for part in (index.training, index.validation):
        both.append({str(Path(record.path).resolve()) for made in part for record in made.records})
    return both[0], both[1]


@given(NAMES, st.floats(0, 1), st.integers(0, 2**32))
def test_the_share_is_rounded_half_up(found: list[str], share: float, seed: int) -> None:
    chosen = held_out(found, share, seed)
    assert chosen <= set(range(len(found)))
    assert abs(len(chosen) - len(found) * share) <= 0.5
    assert len(chosen) == int(len(found) * share + 0.5)


@given(NAMES, st.floats(0, 1), st.integers(0, 99), st.randoms())
def test_the_choice_depends_on_neither_order_nor_place(
    found: list[str], share: float, seed: int, rng: random.Random
) -> None:
    mixed = list(found)
    rng.shuffle(mixed)
    assert {found[i] for i in held_out(found, share, seed)} == {mixed[i] for i in held_out(mixed, share, seed)}


@given(NAMES, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_holds_the_smaller_one(found: list[str], one: float, two: float) -> None:
    assert held_out(found, min(one, two), 5) <= held_out(found, max(one, two), 5)


def test_another_seed_chooses_others_and_each_name_equally_often() -> None:
    found = [f"{number}.png" for number in range(20)]
    counts = [0] * 20
    for seed in range(1000):
        for position in held_out(found, 0.25, seed):
            counts[position] += 1
    assert sum(counts) == 5000
    assert max(abs(count - 250) for count in counts) < 5 * 13.7  # five standard deviations


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("style", ["folder", "metadata"])
def test_training_and_validation_are_disjoint_and_whole(tmp_path: Path, style: str, seed: int | None) -> None:
    folder(tmp_path / "i", 20)
    source = subset(tmp_path / "i", num_repeats=3)
    if style == "metadata":
        metadata = tmp_path / "m.json"
        metadata.write_text(json.dumps({f"{number:03d}.png": {"caption": "x"} for number in range(20)}))
        source = SubsetSettings("m", image_dir=tmp_path / "i", metadata_file=metadata, num_repeats=3)
    config = dataset(source, validation_split=0.3, validation_seed=seed)
    index = build_index([config])
    training, validation = names(index)
    assert not training & validation
    assert (len(training), len(validation)) == (14, 6)
    assert build_index([config]) == index
    assert {record.repeats for record in index.training[0].records} == {3}
    assert {record.repeats for record in index.validation[0].records} == {1}


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("split", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_no_rounding_makes_an_overlap_or_loses_an_image(tmp_path: Path, count: int, split: float) -> None:
    """The original took ceil for training and round for validation: 7 images at 0.1 overlapped by one."""
    if int(count * split + 0.5) == count:
        return
    folder(tmp_path / "i", count, (16, 16), captions=False)
    training, validation = names(build_index([dataset(subset(tmp_path / "i"), validation_split=split)]))
    assert not training & validation
    assert len(training) + len(validation) == count


def test_without_a_validation_seed_the_seed_of_the_run_chooses(tmp_path: Path) -> None:
    folder(tmp_path / "i", 20)
    unset = dataset(subset(tmp_path / "i"), validation_split=0.5)
    own = dataset(subset(tmp_path / "i"), validation_split=0.5, validation_seed=3)
    assert names(build_index([unset], seed=3)) == names(build_index([own], seed=99))
    assert names(build_index([unset], seed=3)) != names(build_index([unset], seed=4))


def test_moving_the_folder_moves_no_image_across_the_split(tmp_path: Path) -> None:
    folder(tmp_path / "one", 20)
    before = {
        Path(path).name for path in names(build_index([dataset(subset(tmp_path / "one"), validation_split=0.3)]))[1]
    }
    (tmp_path / "one").rename(tmp_path / "two")
    after = {
        Path(path).name for path in names(build_index([dataset(subset(tmp_path / "two"), validation_split=0.3)]))[1]
    }
    assert before == after


def test_an_image_that_one_dataset_validates_on_is_trained_on_by_none(tmp_path: Path) -> None:
    folder(tmp_path / "i", 20)
    metadata = tmp_path / "m.json"
    metadata.write_text(
        json.dumps({str(tmp_path / "i" / f"{number:03d}.png"): {"caption": "x"} for number in range(20)})
    )
    configs = [
        dataset(subset(tmp_path / "i"), validation_split=0.3, validation_seed=1, name="one"),
        dataset(subset(tmp_path / "i"), validation_split=0.2, validation_seed=2, name="two"),
        dataset(subset(tmp_path / "i"), name="three"),
        dataset(SubsetSettings("m", metadata_file=metadata), name="four"),
    ]
    index = build_index(configs)
    training, validation = names(index)
    assert not training & validation
    assert len(training | validation) == 20
    assert any("three" in warning and "validated on elsewhere" in warning for warning in index.warnings)


def test_one_folder_at_two_resolutions_is_split_alike(tmp_path: Path) -> None:
    folder(tmp_path / "i", 20)
    configs = [
        dataset(subset(tmp_path / "i"), resolution=(side, side), validation_split=0.3, name=f"at {side}")
        for side in (64, 128)
    ]
    index = build_index(configs)
    assert [len(made.records) for made in index.training] == [14, 14]
    assert [len(made.records) for made in index.validation] == [6, 6]
    assert index.warnings == []


def test_links_do_not_let_a_validation_image_into_training(tmp_path: Path) -> None:
    folder(tmp_path / "real", 4)
    try:
        (tmp_path / "linked").symlink_to("real", target_is_directory=True)
        (tmp_path / "single").mkdir()
        for number in range(4):
            (tmp_path / "single" / f"other{number}.png").symlink_to(tmp_path / "real" / f"{number:03d}.png")
    except (OSError, NotImplementedError):
        pytest.skip("no symbolic links here")
    held = dataset(subset(tmp_path / "real"), validation_split=1.0)
    for name in ["linked", "single"]:
        with pytest.raises(UserError, match="held out for validation"):
            build_index([held, dataset(subset(tmp_path / name), name="two")])


def test_a_whole_dataset_may_be_for_validation(tmp_path: Path) -> None:
    folder(tmp_path / "train", 3)
    folder(tmp_path / "check", 2)
    index = build_index(
        [dataset(subset(tmp_path / "train")), dataset(subset(tmp_path / "check"), validation_split=1.0, name="two")]
    )
    assert [made.settings.name for made in index.training] == ["dataset 1"]
    assert [made.settings.name for made in index.validation] == ["two"]
    with pytest.raises(UserError, match="held out for validation"):
        build_index([dataset(subset(tmp_path / "check"), validation_split=1.0)])


def test_regularisation_images_are_never_validated_on_and_follow_the_rest(tmp_path: Path) -> None:
    folder(tmp_path / "own", 10)
    folder(tmp_path / "reg", 4)
    config = dataset(subset(tmp_path / "own"), subset(tmp_path / "reg", is_reg=True), validation_split=0.2)
    index = build_index([config])
    assert not any(record.is_reg for record in index.validation[0].records)
    assert len(index.validation[0].records) == 2
    assert sum(record.repeats for record in index.training[0].records if record.is_reg) == 8


def test_too_few_images_to_split_are_a_warning(tmp_path: Path) -> None:
    folder(tmp_path / "i", 3)
    index = build_index([dataset(subset(tmp_path / "i"), validation_split=0.1)])
    assert index.validation == []
    assert any("too few" in warning for warning in index.warnings)


def test_validation_has_no_augmentation_dropout_shuffle_or_wildcard(tmp_path: Path) -> None:
    for number in range(4):
        image(tmp_path / f"{number}.png", caption="{a|b}, c, d\nother line")
    lively = {
        "shuffle_caption": True,
        "enable_wildcard": True,
        "caption_dropout_rate": 0.9,
        "caption_dropout_every_n_epochs": 1,
        "caption_tag_dropout_rate": 0.9,
        "token_warmup_step": 100.0,
        "caption_prefix": "{p|q}",
    }
    source = subset(
        tmp_path,
        captions=lively,
        color_aug=True,
        flip_aug=True,
        random_crop=True,
        face_crop_aug_range=(1.0, 2.0),
        alpha_mask=True,
        num_repeats=5,
    )
    config: DatasetSettings = dataset(source, validation_split=0.5, batch_size=3)
    index = build_index([config])
    (made,) = index.validation
    (calm,) = made.settings.subsets
    assert (calm.color_aug, calm.flip_aug, calm.random_crop, calm.face_crop_aug_range) == (False, False, False, None)
    assert (calm.num_repeats, calm.alpha_mask, made.settings.batch_size) == (1, True, 3)
    assert is_random(calm.captions) == []
    for record in made.records:
        for epoch in range(1, 4):
            fed = CaptionPipeline(calm.captions).at(record.caption, random.Random(epoch), 0, epoch)
            assert fed == "p a, c, d"
    assert index.training[0].settings == config
    assert {record.caption for record in index.training[0].records} == {"{a|b}, c, d\nother line"}
