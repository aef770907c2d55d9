"""Another model family than SD3 trains through NetworkTrainer: what tests/toy_family.py defines is all that the seam asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.options.resolve import resolve_options
from tests.end_to_end.runs import image_folder
from tests.toy_family import ToyDenoiser, ToyNetworkTrainer


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    save_file(ToyDenoiser().state_dict(), folder / "toy.safetensors")
    image_folder(folder / "images" / "1_toy", 4)
    (folder / "prompts.txt").write_text("a toy --w 64 --h 64 --s 2\n", encoding="utf-8")
    return folder


def train(toy: Path, output: Path, *more: str, steps: int = 6) -> dict[str, Tensor]:
    words = [
        f"--pretrained_model_name_or_path={toy / 'toy.safetensors'}",
        f"--train_data_dir={toy / 'images'}",
        f"--output_dir={output}",
    ]
    words += [
        "--output_name=lora",
        "--network_module=tests.toy_family",
        "--resolution=64",
        "--learning_rate=1e-2",
        "--seed=3",
    ]
    words += ["--max_data_loader_n_workers=0", f"--max_train_steps={steps}", *more]
    options = resolve_options(words)
    ToyNetworkTrainer(options.args, options.problems).train()
    return load_file(output / "lora.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_it_trains_with_the_memory_savers_and_resumes_to_the_bit(toy: Path, tmp_path: Path) -> None:
    plain = train(toy, tmp_path / "plain")
    assert max(tensor.abs().max().item() for key, tensor in plain.items() if "lora_up" in key) > 0
    assert equal(train(toy, tmp_path / "checkpointed", "--gradient_checkpointing"), plain)
    assert equal(train(toy, tmp_path / "swapped", "--blocks_to_swap=2", "--gradient_checkpointing"), plain)

    train(toy, tmp_path / "resumed", "--save_state", "--save_every_n_steps=3", steps=3)
    assert equal(train(toy, tmp_path / "resumed", "--resume=auto", "--save_state", "--save_every_n_steps=3"), plain)


def test_it_draws_previews(toy: Path, tmp_path: Path) -> None:
    train(toy, tmp_path, f"--sample_prompts={toy / 'prompts.txt'}", "--sample_every_n_steps=2", steps=2)
    (picture,) = (tmp_path / "sample").glob("*.png")
    with Image.open(picture) as image:
        assert image.size == (64, 64)
