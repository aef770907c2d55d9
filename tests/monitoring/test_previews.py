"""Previews: what they are called, what is in them, and that training does not notice them."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from library.common.seeds import preserve_rng_state
from library.data.prompts import PreviewPrompt
from library.monitoring import contact_sheet, previews
from library.monitoring.contact_sheet import PreviewRecord, columns_of, write_sheet
from library.monitoring.previews import Previewer, PreviewSettings
from library.training.callback_settings import step_tag
from library.training.ema import WeightEma

CPU = torch.device("cpu")
SMALL = {"width": 64, "height": 96, "steps": 3}


def decode(latents: Tensor) -> Tensor:
    """[1, 16, h, w] -> [1, 3, 8h, 8w]"""
    return torch.tanh(latents[:, :3]).repeat_interleave(8, 2).repeat_interleave(8, 3)


class Denoiser(nn.Module):
    """Draws random numbers and has dropout, as training's models may."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        torch.rand(3)
        random.random()
        np.random.rand()
        return self.dropout(x * self.scale) + conditioning


def previewer(
    folder: Path, prompts: list[PreviewPrompt], model: Denoiser, rank: int = 0, processes: int = 1
) -> Previewer:
    settings = PreviewSettings(folder, "cat", "euler", rank, processes)
    return Previewer(prompts, settings, lambda prompt, text: float(len(text)) / 100, model, decode, CPU)


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_names_say_when_which_prompt_and_seed(tmp_path: Path) -> None:
    prompts = [PreviewPrompt("a", seed=12, **SMALL), PreviewPrompt("b", **SMALL)]
    made = previewer(tmp_path, prompts, Denoiser()).make(step_tag(100, None), [])
    assert all(preview.path.parent == tmp_path / "sample" for preview in made)
    assert re.fullmatch(r"cat_000100_00_\d{14}_12\.png", made[0].path.name)
    assert re.fullmatch(r"cat_000100_01_\d{14}\.png", made[1].path.name)
    assert step_tag(100, 3) == "e000003" and step_tag(0, 0) == "e000000"
    assert Image.open(made[0].path).size == (64, 96)


def test_a_seed_means_the_same_picture_whatever_was_drawn_before(tmp_path: Path) -> None:
    model = Denoiser()
    maker = previewer(tmp_path, [PreviewPrompt("a cat", seed=5, **SMALL)], model)
    (first,) = maker.make("000001", [model])
    torch.rand(10)
    (second,) = maker.make("000002", [model])
    assert np.array_equal(pixels_of(first.path), pixels_of(second.path))
    model.scale.data += 1
    (third,) = maker.make("000003", [model])
    assert not np.array_equal(pixels_of(first.path), pixels_of(third.path))


def test_options_of_the_prompt_reach_the_picture(tmp_path: Path) -> None:
    base: dict[str, Any] = {"seed": 5, **SMALL}
    others = [
        PreviewPrompt("a cat", **base),
        PreviewPrompt("a long story about a cat", **base),
        PreviewPrompt("a cat", "a dog", **base),
        PreviewPrompt("a cat", guidance=3.0, **base),
        PreviewPrompt("a cat", shift=1.0, **base),
        PreviewPrompt("a cat", **{**base, "steps": 5}),
        PreviewPrompt("a cat", **{**base, "seed": 6}),
        PreviewPrompt("a cat", sampler="heun", **base),
    ]
    model = Denoiser()
    made = previewer(tmp_path, others, model).make("000001", [model])
    found = [pixels_of(preview.path).tobytes() for preview in made]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(("pixels", "largest"), [(0, 1), (2 * 64 * 96 - 1, 1), (2 * 64 * 96, 2)])
def test_guidance_in_one_batch_is_the_same_picture(tmp_path: Path, pixels: int, largest: int) -> None:
    """It is used where two images are no more than training's largest batch."""
    model, sizes = Denoiser().eval(), set[int]()

    def predict(x: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        sizes.add(len(x))
        assert len(x) == len(timesteps) == len(conditioning)
        return model(x, timesteps, conditioning.view(-1, 1, 1, 1))

    def conditioned(prompt: PreviewPrompt, text: str) -> Tensor:
        return torch.full((1,), len(text) / 100)

    prompt = PreviewPrompt("a cat", "a hippopotamus", seed=5, **SMALL)
    maker = Previewer(
        [prompt],
        PreviewSettings(tmp_path, "x", max_batch_pixels=pixels),
        conditioned,
        predict,
        decode,
        CPU,
        lambda a, b: torch.cat([a, b]),
    )
    (made,) = maker.make("000001", [])
    (plain,) = Previewer([prompt], PreviewSettings(tmp_path, "y"), conditioned, predict, decode, CPU).make("000001", [])
    assert max(sizes) == largest
    assert np.array_equal(pixels_of(made.path), pixels_of(plain.path))


def test_without_guidance_the_negative_prompt_is_not_asked(tmp_path: Path) -> None:
    asked: list[str] = []
    prompt = PreviewPrompt("a cat", "a dog", guidance=1.0, **SMALL)
    settings = PreviewSettings(tmp_path, "")

    def conditioned(prompt: PreviewPrompt, text: str) -> float:
        asked.append(text)
        return 0.0

    (made,) = Previewer([prompt], settings, conditioned, Denoiser(), decode, CPU).make("000001", [])
    assert asked == ["a cat"]
    assert made.path.name.startswith("000001_00_")  # no output name, no underscore


def test_training_does_not_notice_previews(tmp_path: Path) -> None:
    """Random states, modes of every module, gradients and EMA are as they were."""
    model = Denoiser()
    model.dropout.eval()  # a part that training keeps in eval mode stays there
    ema = WeightEma(dict(model.named_parameters()), 0.9)
    ema.update()
    model.scale.grad = torch.tensor(2.0)
    maker = previewer(tmp_path, [PreviewPrompt("a", **SMALL)], model)
    random.seed(3)
    torch.manual_seed(3)
    np.random.seed(3)
    expected = (random.random(), torch.rand(4), ema.averages["scale"].clone(), model.scale.item(), np.random.rand())
    random.seed(3)
    torch.manual_seed(3)
    np.random.seed(3)
    with ema.swapped():
        maker.make("000001", [model])
    assert random.random() == expected[0] and torch.equal(torch.rand(4), expected[1])
    assert torch.equal(ema.averages["scale"], expected[2]) and model.scale.item() == expected[3]
    assert np.random.rand() == expected[4]
    assert model.training and not model.dropout.training
    assert model.scale.grad == 2.0 and torch.is_grad_enabled()


def test_modes_and_random_states_come_back_after_an_error() -> None:
    model = Denoiser()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"), preserve_rng_state([model]):
        assert not model.training and not model.dropout.training
        torch.rand(1)
        raise RuntimeError("broken")
    assert model.training and model.dropout.training and torch.equal(torch.get_rng_state(), state)


def test_processes_share_the_prompts(tmp_path: Path) -> None:
    prompts = [PreviewPrompt(str(number), seed=number, **SMALL) for number in range(5)]
    shares = [
        [preview.index for preview in previewer(tmp_path, prompts, Denoiser(), rank, 2).make("000001", [])]
        for rank in range(2)
    ]
    assert shares == [[0, 2, 4], [1, 3]]


def test_the_picture_tells_its_prompt(tmp_path: Path) -> None:
    prompt = PreviewPrompt("a cät", "a dog", seed=5, **SMALL)
    (made,) = previewer(tmp_path, [prompt], Denoiser()).make("000001", [])
    text = Image.open(made.path).info["parameters"]
    assert text.startswith(
        "a cät\nNegative prompt: a dog\nSteps: 3, Sampler: euler, CFG scale: 7.5, Seed: 5, Size: 64x96"
    )


def test_a_full_disk_costs_a_preview_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(previews, "atomic_write", full)
    monkeypatch.setattr(contact_sheet, "atomic_write", full)
    found = records(tmp_path, 1)
    assert previewer(tmp_path, [PreviewPrompt("a", **SMALL)], Denoiser()).make("000001", []) == []
    write_sheet(tmp_path / "sheet.png", found)
    assert [
        text for text in caplog.messages if "No space left" in text and "training goes on" in text
    ] == caplog.messages
    assert len(caplog.messages) == 2


# --- the sheet --------------------------------------------------------------------------------------------------------


def records(folder: Path, steps: int, prompts: int = 2) -> list[PreviewRecord]:
    found = []
    for step in range(steps):
        for index in reversed(range(prompts)):  # the order in which processes finish is no matter
            path = folder / f"{step}_{index}.png"
            Image.new("RGB", (32, 64), (40 * step % 256, 100 * index, 90)).save(path)
            found.append(PreviewRecord(step, None, index, f"prompt {index}", path))
    return found


def test_the_sheet_has_prompts_down_and_steps_across(tmp_path: Path) -> None:
    write_sheet(tmp_path / "sheet.png", records(tmp_path, 3))
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (3 * (256 + 6) + 6, 24 + 2 * (256 + 22 + 6))
    for column in range(3):
        for row in range(2):
            x, y = 6 + column * 262 + 128, 24 + row * 284 + 22 + 128
            assert sheet.getpixel((x, y)) == (40 * column, 100 * row, 90)


def test_many_steps_are_thinned_and_the_first_and_last_stay(tmp_path: Path) -> None:
    columns = columns_of(records(tmp_path, 40, 1), most=8)
    steps = [column[0].step for column in columns]
    assert len(steps) == 8 and steps[0] == 0 and steps[-1] == 39 and steps == sorted(steps)


def test_pictures_that_are_gone_leave_a_gap(tmp_path: Path) -> None:
    found = records(tmp_path, 2)
    found[0].path.unlink()
    write_sheet(tmp_path / "sheet.png", found)
    assert (tmp_path / "sheet.png").exists()
    for record in found[1:]:
        record.path.unlink()
    (tmp_path / "sheet.png").unlink()
    write_sheet(tmp_path / "sheet.png", found)
    assert not (tmp_path / "sheet.png").exists()


def test_a_picture_that_was_cut_short_leaves_a_gap_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = records(tmp_path, 2)
    found[0].path.write_bytes(found[0].path.read_bytes()[:60])
    write_sheet(tmp_path / "sheet.png", found)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.getpixel((6 + 128, 24 + 284 + 22 + 128)) == (255, 255, 255)  # the cut one: step 0, prompt 1
    assert sheet.getpixel((6 + 128, 24 + 22 + 128)) == (0, 0, 90)
    assert found[0].path.name in caplog.text


def test_a_resumed_run_knows_its_earlier_previews(tmp_path: Path) -> None:
    (record,) = records(tmp_path, 1, 1)
    by_epoch = PreviewRecord(8, 2, 0, "日本語 prompt", record.path)
    assert PreviewRecord.from_record(record.as_record()) == record
    assert PreviewRecord.from_record(by_epoch.as_record()) == by_epoch
    assert PreviewRecord.from_record({"step": 1, "loss": 2.0}) is None
    write_sheet(tmp_path / "sheet.png", [by_epoch])  # signs that the font lacks are no error
    record.path.unlink()
    assert PreviewRecord.from_record(by_epoch.as_record()) is None
