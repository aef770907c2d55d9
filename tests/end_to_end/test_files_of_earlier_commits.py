"""Training states, caches and LoRA files of earlier commits still do what they did (tests/data_files/README.md)."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sd3_train_network import main
from tests.data_files import make
from tools import check_lora, convert_lora, merge_lora, show_metadata

FOLDER = Path(make.__file__).parent / "ee928c8"
FACTS = json.loads((FOLDER / "facts.json").read_text(encoding="utf-8"))
SAME_MACHINE = FACTS["environment"] == make.environment()
SAME_TOKENIZERS = all(FACTS["environment"][n] == make.environment()[n] for n in ("transformers", "tokenizers"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.make_model(tmp_path_factory.mktemp("model_of_data_files"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the files were made: more threads sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Equal to the bit on the machine that made the file, elsewhere to rounding."""
    a, b = load_file(ours), load_file(theirs)
    assert a.keys() == b.keys()
    for key in a:
        if SAME_MACHINE:
            assert torch.equal(a[key], b[key]), key
        assert torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-5), key


@pytest.mark.skipif(sys.platform == "win32", reason="the states name their images by paths that Windows has not")
@pytest.mark.parametrize("name", make.STATES)
def test_a_state_goes_on_to_the_weights_that_its_run_ended_with(model: Path, tmp_path: Path, name: str):
    saved = FOLDER / "states" / name
    with make.work_folder(FOLDER / "images") as images:
        resumed = make.words(model, images, tmp_path, *make.STATES[name], "--resume", str(saved / "state"))
        assert main(resumed) == 0
    assert make.losses(tmp_path) == pytest.approx(FACTS["losses"][name][make.STATE_STEP :], rel=1e-4)
    files = [path.name for path in saved.glob("*.safetensors")]
    assert files
    for file in files:
        assert_same_weights(tmp_path / file, saved / file)


def test_caches_are_used_without_loading_encoders_or_vae(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded: set[str] = set()
    load = torch.nn.Module.load_state_dict

    def load_and_note(self: torch.nn.Module, *args, **kwargs):
        loaded.add(type(self).__name__)
        return load(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", load_and_note)
    shutil.copytree(FOLDER / "cached_images", tmp_path / "images")
    caches = sorted((tmp_path / "images").rglob("*.safetensors"))
    assert len(caches) == 2 * len(make.CACHED_IMAGES)
    tensors = {path: load_file(path) for path in caches}
    # Another version of the tokenizers' package may write their rules down in other words: then they count as changed.
    more = () if SAME_TOKENIZERS else ("--skip_cache_check",)
    assert main([*make.cache_run_words(model, tmp_path / "images", tmp_path / "out"), *more]) == 0
    assert loaded == {"MMDiT"}
    assert make.losses(tmp_path / "out") == pytest.approx(FACTS["losses_with_caches"], rel=1e-4)
    assert sorted((tmp_path / "images").rglob("*.safetensors")) == caches
    for path in caches:
        now = load_file(path)
        assert now.keys() == tensors[path].keys() and all(torch.equal(now[k], tensors[path][k]) for k in now)
        path.unlink()
    assert main(make.cache_run_words(model, tmp_path / "images", tmp_path / "out")) == 0
    assert {"CLIPTextModelWithProjection", "Vae"} < loaded  # a load is noticed


@pytest.mark.parametrize("name", make.LORAS)
def test_a_lora_file_loads_and_does_what_it_did(model: Path, tmp_path: Path, name: str):
    """With --network_weights, and in the tools that check, merge, convert and show it."""
    file = str(FOLDER / "loras" / f"{name}.safetensors")
    module = ("--network_module", "lycoris.kohya") if name == "locon" else ()
    if module:
        pytest.importorskip("lycoris")
    start = ("--network_weights", file, "--dim_from_weights", make.UNET, *module, *make.STILL)
    assert main(make.words(model, FOLDER / "images", tmp_path / "out", *start)) == 0
    assert make.losses(tmp_path / "out") == pytest.approx([FACTS["loss_with"][name]], rel=1e-4)
    assert abs(FACTS["loss_with"][name] - FACTS["loss_with"]["nothing"]) > 0.01

    assert check_lora.main([file, "--base_model", str(model)]) == 0
    assert show_metadata.main(["--model", file]) == 0
    merged = tmp_path / "merged.safetensors"
    assert merge_lora.main(["--models", file, "--base_model", str(model), "--save_to", str(merged)]) == 0
    assert make.change_of(model, merged) == pytest.approx(FACTS["merged_change"][name], rel=1e-4)
    converted = convert_lora.main(["--model", file, "--save_to", str(tmp_path / "converted.safetensors")])
    assert converted == (2 if name == "dora" else 0)  # diffusers reads no DoRA
