"""Metadata of LoRA files: names and values made from plain facts."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from datetime import datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.common.errors import UserError
from library.data.dataset import ImageRecord, IndexedDataset
from library.data.settings import DatasetSettings, SubsetSettings
from library.saving import metadata as metadata_module, model_hash
from library.saving.dataset_facts import common, datasets_of_file, folders, tag_frequency
from library.saving.metadata import FamilyFacts, FileMetadata, RunFacts, SaveFacts, as_texts
from library.saving.model_hash import FileHashes
from library.saving.modelspec import LARGEST_AS_IT_IS, ModelSpec, modelspec_metadata, thumbnail_url
from library.saving.saver import write_weights

SPEC = ModelSpec("medium", "cat", (1024, 768))


def record(name: str, caption: str, subset: int = 0, repeats: int = 1, is_reg: bool = False) -> ImageRecord:
    return ImageRecord(name, (64, 64), 1, 1, caption, subset, (64, 64), (64, 64), None, repeats, is_reg, 1.0)


def dataset(*records: ImageRecord, subsets: tuple[SubsetSettings, ...]) -> IndexedDataset:
    settings = DatasetSettings("dataset 1", subsets, (64, 64), enable_bucket=True)
    return IndexedDataset(settings, list(records), {(64, 64): list(range(len(records)))})


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("medium", "stable-diffusion-3-medium/lora"),
        ("5-medium", "stable-diffusion-3-5-medium/lora"),
        ("5-large", "stable-diffusion-3-5-large/lora"),
    ],
)
def test_architecture_is_the_models_own(kind: str, architecture: str) -> None:
    metadata = modelspec_metadata(ModelSpec(kind, "t", (512, 512)), datetime(2026, 1, 2, 3, 4, 5, 678))
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.date"] == "2026-01-02T03:04:05"
    assert "modelspec.timestep_range" not in metadata


def test_values_are_texts_as_sd_scripts_writes_them() -> None:
    assert as_texts({"a": None, "b": 1e-4, "c": (64, 64), "d": {"ä": 1}, "e": [{"x": None}], "f": [1, 2]}) == {
        "a": "None",
        "b": "0.0001",
        "c": "(64, 64)",
        "d": '{"ä": 1}',
        "e": '[{"x": null}]',
        "f": "[1, 2]",
    }


def test_a_folder_whose_name_is_no_text_can_be_told(tmp_path: Path) -> None:
    """Linux allows any bytes in names; Python reads such a name with lone surrogates."""
    name = b"3_caf\xe9".decode("utf-8", "surrogateescape")
    texts = as_texts({"ss_dataset_dirs": {name: {"n_repeats": 3}}})
    assert json.loads(texts["ss_dataset_dirs"]) == {"3_caf?": {"n_repeats": 3}}
    write_weights(tmp_path / "x.safetensors", {"a": torch.ones(1)}, texts)


def test_very_many_captions_keep_the_commonest_and_the_file_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metadata_module, "LARGEST_TEXT", 20_000)
    monkeypatch.setattr(metadata_module, "MOST_TAGS", 1000)
    captions = [f"a sentence of its own, number {number}" for number in range(5000)]
    found = dataset(
        *(record(str(n), text) for n, text in enumerate(captions)),
        subsets=(SubsetSettings("a", image_dir=Path("cats")),),
    )
    base = tmp_path / "base.safetensors"
    base.write_bytes(b"x")
    facts = RunFacts(
        {"ss_seed": 1, **datasets_of_file([found])},
        SPEC,
        FamilyFacts("medium", "Stable Diffusion 3 Medium", base, None),
    )
    metadata = FileMetadata(facts).at(SaveFacts(1, 1, 1.0))
    kept = json.loads(metadata["ss_tag_frequency"])["cats"]
    assert 20 < len(kept) < 5000 and kept["a sentence of its own"] == 5000
    assert json.loads(metadata["ss_datasets"])[0]["tag_frequency"]["cats"] == kept
    assert sum(len(text) for key, text in metadata.items() if key.startswith("ss_")) < 21_000
    assert metadata["ss_seed"] == "1" and "commonest" in caplog.text
    assert len(facts.training["ss_tag_frequency"]["cats"]) == 5001  # the facts themselves are left whole


def test_tags_are_counted_by_folder_without_regularisation_images() -> None:
    subsets = (
        SubsetSettings("a", image_dir=Path("/data/cats")),
        SubsetSettings("b", image_dir=Path("/data/reg"), is_reg=True),
        SubsetSettings("c", metadata_file=Path("/data/meta.json")),
    )
    found = dataset(
        record("0", "Cat, on grass , "),
        record("1", "cat"),
        record("2", "a dog", 1, is_reg=True),
        record("3", "cat", 2),
        subsets=subsets,
    )
    assert tag_frequency(found) == {"cats": {"cat": 2, "on grass": 1}, "meta.json": {"cat": 1}}
    facts = datasets_of_file([found, found])
    assert facts["ss_tag_frequency"] == tag_frequency(found)  # a folder of two datasets counts once
    assert list(facts["ss_dataset_dirs"]) == ["cats", "meta.json", "cats (2)", "meta.json (2)"]
    assert folders([found], regularisation=True) == {"reg": {"n_repeats": 1, "img_count": 1}}


def test_values_that_differ_between_subsets_are_all_told() -> None:
    assert common([0.1, 0.1]) == 0.1
    assert common([0.1, 0.2]) == [0.1, 0.2]


def test_a_save_before_the_hash_is_ready_goes_without_it_and_the_final_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base.safetensors"
    base.write_bytes(b"weights" * 1000)
    may_go_on = threading.Event()
    true_hash = model_hash._sha256

    def slow(path: Path) -> str:
        assert may_go_on.wait(20)
        return true_hash(path)

    monkeypatch.setattr(model_hash, "_sha256", slow)
    described = FileMetadata(
        RunFacts({"ss_network_dim": 4}, SPEC, FamilyFacts("medium", "Stable Diffusion 3 Medium", base, None))
    )
    tensors = {"a": torch.ones(3)}
    metadata = described.at(SaveFacts(1, 1, 1.0))
    assert "ss_new_sd_model_hash" not in described.with_hashes(metadata, tensors, wait=False)
    threading.Timer(0.1, may_go_on.set).start()
    final = described.with_hashes(metadata, tensors, wait=True)
    assert final["ss_new_sd_model_hash"] == hashlib.sha256(b"weights" * 1000).hexdigest()
    assert "ss_new_sd_model_hash" in described.with_hashes(metadata, tensors, wait=False)


def test_a_file_that_cannot_be_read_has_no_hash_and_stops_nothing(tmp_path: Path) -> None:
    assert FileHashes([tmp_path / "gone"]).all() == {}


def test_editing_metadata_does_not_change_the_model_hash() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    one = model_hash.lora_hashes(tensors, {"ss_x": "1"})
    other = model_hash.lora_hashes(tensors, {"ss_x": "something longer"})
    assert one["sshs_model_hash"] == other["sshs_model_hash"]
    assert one["sshs_model_hash"] != model_hash.lora_hashes({"a": torch.ones(6)}, {})["sshs_model_hash"]


def test_a_large_thumbnail_is_made_smaller(tmp_path: Path) -> None:
    picture = tmp_path / "large.png"
    noise = np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture)
    assert picture.stat().st_size > LARGEST_AS_IT_IS
    head, _, data = thumbnail_url(str(picture)).partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(BytesIO(base64.b64decode(data))).size == (512, 384)
    assert thumbnail_url("data:image/png;base64,AAAA") == "data:image/png;base64,AAAA"


def test_a_thumbnail_that_is_no_picture_is_the_users_mistake(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    with pytest.raises(UserError, match="metadata_thumbnail"):
        thumbnail_url(str(text))


def test_without_metadata_the_few_keys_that_readers_need_stay(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    base.write_bytes(b"x")
    training = {"ss_v2": False, "ss_network_dim": 4, "ss_seed": 1}
    described = FileMetadata(
        RunFacts(training, SPEC, FamilyFacts("medium", "Stable Diffusion 3 Medium", base, None), minimal=True)
    )
    metadata = described.with_hashes(described.at(SaveFacts(1, 1, 1.0)), {"a": torch.ones(1)}, wait=True)
    assert {key for key in metadata if key.startswith("ss_")} == {"ss_v2", "ss_network_dim"}
    assert json.dumps(metadata)
