"""What a real run leaves to look at: report, metrics, sheet of previews, TensorBoard; and that resuming goes on with them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from library.options.resolve import resolve_options
from sd3_train_network import main
from tests.end_to_end.conftest import Workshop
from tests.monitoring.test_report import Page

SECRET = "hunter2-secret-key"


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "lora.metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def words(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("watched")
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\na dog --w 64 --h 96 --s 2 --l 1 --d 2\n", encoding="utf-8")
    more = [
        "--sample_prompts",
        str(prompts),
        "--sample_every_n_steps",
        "2",
        "--sample_at_first",
        "--huggingface_token",
        SECRET,
    ]
    more += ["--validation_split", "0.2", "--validate_every_n_steps", "2", "--save_state", "--save_every_n_steps", "4"]
    more += ["--logging_dir", str(folder / "logs"), "--log_config", "--scale_weight_norms", "1.0"]
    return workshop.arguments(folder / "out", *more, max_train_steps=4, text_encoder_lr="5e-4")


@pytest.fixture(scope="module")
def trained(words: list[str]) -> Path:
    assert main(words) == 0
    return Path(words[words.index("--output_dir") + 1])


def test_the_metrics_file_has_steps_epochs_validation_and_previews(trained: Path) -> None:
    lines = lines_of(trained)
    steps = [line for line in lines if "loss/current" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    wanted = {
        "loss/average",
        "lr/unet",
        "lr/textencoder 1",
        "lr/textencoder 2",
        "gradient_norm",
        "seconds",
        "memory_gib",
    }
    assert wanted | {"max_norm/keys_scaled", "norm/avg_key_norm", "max_norm/max_key_norm"} <= steps[0].keys()
    assert [line["step"] for line in lines if "loss/validation/step_average" in line] == [2, 4]
    assert [(line["step"], line["index"]) for line in lines if "preview" in line] == [
        (step, index) for step in (0, 2, 4) for index in (0, 1)
    ]


def test_the_report_shows_the_run_and_no_secret(trained: Path) -> None:
    text = (trained / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert (
        "finished" in page.text
        and "4 / 4" in page.text
        and "a dog" in page.text
        and re.search(r"MMDiT, \d blocks, hidden \d+", page.text)
    )
    assert "64x64" in page.text and page.count["img"] >= 6 + 6  # previews and images
    assert SECRET not in text


def test_tensorboard_has_scalars_under_sd_scripts_names_and_previews(trained: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (folder,) = (trained.parent / "logs").glob("*/network_train")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    scalars = {"loss/current", "loss/average", "lr/unet", "lr/textencoder 1", "loss/validation/step_average"}
    assert scalars <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/current")] == [1, 2, 3, 4]
    assert [event.step for event in events.Images("sample_1")] == [0, 2, 4]
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_the_command_of_the_report_goes_on_with_the_run(trained: Path, words: list[str]) -> None:
    """The report's own words, to four more steps: curves, previews and sheet hold both halves."""
    text = Page((trained / "report.html").read_text(encoding="utf-8")).text
    command = text[text.index("python sd3_train_network.py") : text.index("Copy")].replace("\\\n", " ")
    again = shlex.split(command)[2:]
    assert resolve_options(again).problems == []
    (trained / "lora.metrics.jsonl").open("a").write('{"step": 99, "loss/current": 5.0}\n')
    again[again.index("--max_train_steps") + 1] = "6"
    assert main(again) == 0
    lines = lines_of(trained)
    assert [line["step"] for line in lines if "loss/current" in line] == [1, 2, 3, 4, 5, 6]
    assert sorted({line["step"] for line in lines if "preview" in line}) == [0, 2, 4, 6]
    sheet = Image.open(trained / "lora_contact_sheet.png")
    assert sheet.width == 4 * 262 + 6
    page = Page((trained / "report.html").read_text(encoding="utf-8"))
    assert "6 / 6" in page.text and all(f"step {step}" in page.text for step in (0, 2, 4, 6))


def test_a_run_without_report_writes_none(workshop: Workshop, tmp_path: Path) -> None:
    assert main(workshop.arguments(tmp_path, "--no_report", "--network_train_unet_only", max_train_steps=1)) == 0
    assert not (tmp_path / "report.html").exists() and (tmp_path / "lora.safetensors").exists()


def test_a_preview_that_the_model_has_no_place_for_is_told_before_training(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat --w 8192 --h 64\n", encoding="utf-8")
    assert main(workshop.arguments(tmp_path, sample_prompts=prompts, sample_every_n_steps=2)) == 2
    told = capsys.readouterr().err
    assert "8192x64" in told and "--sample_prompts" in told
