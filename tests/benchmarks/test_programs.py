"""The benchmarks of whole programs run, on few and small images, and report what they measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import cache, dataset_index, startup
from benchmarks.measuring import make_images
from tests.sd3.tiny import tiny_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model_folder(tmp_path_factory.mktemp("model")))


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def leaves_a_cache(folder: str) -> str:
    """A command that fails where it finds a cache in a file, and leaves one."""
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]) / 'x.safetensors'; assert not p.exists(); p.touch()"
    return f'{sys.executable} -c "{code}" {folder}'


def test_caching_is_timed_beside_another_program_on_the_same_images(model: str, capsys: pytest.CaptureFixture[str]):
    words = ["--pretrained_model_name_or_path", model, "--images", "2", "--resolution", "64"]
    cache.main([*words, "--kind", "text", "--rounds", "1", "--against", leaves_a_cache("{data}")])
    ours, against, ratio = rows_of(capsys)
    assert ours["items_per_second"] == pytest.approx(2 / ours["seconds"])
    assert ratio["items_per_second"] == pytest.approx(ours["items_per_second"] / against["items_per_second"])


def test_the_first_step_comes_before_the_end(model: str, tmp_path: Path):
    make_images(tmp_path, 2, 64)
    chosen = startup.parser().parse_args(["--pretrained_model_name_or_path", model])
    row = startup.first_step("cold", chosen, tmp_path)
    assert 0 < row["first_step"] < row["seconds"] and row["peak_mib"] > 100
    assert len(list(tmp_path.glob("1_thing/*.safetensors"))) == 4  # latents and text of two images
    assert "--max_train_steps 1" in " ".join(startup.command("live", chosen, tmp_path, 1))


def test_start_up_is_compared_from_caches_of_the_kind_that_was_asked_for(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Cold: files of caches are gone before each run. Warm: both have run before and nothing is removed."""
    data = make_images(tmp_path, 1, 64)
    caches_present: list[bool] = []

    def run(program) -> dict:
        caches_present.append((data / "some.safetensors").exists())
        (data / "some.safetensors").touch()
        return {"what": program.what, "seconds": 1.0}

    monkeypatch.setattr(startup.Program, "run", run)
    words = ["--pretrained_model_name_or_path", model, "--rounds", "2", "--against", "x {folder} {output}"]
    for kind, expected in (("cold", [False] * 4), ("warm", [False] + [True] * 5)):
        caches_present.clear()
        (data / "some.safetensors").unlink(missing_ok=True)
        startup.in_turn(startup.parser().parse_args([*words, "--caches", kind]), tmp_path, data)
        assert caches_present == expected


def test_the_index_is_timed_cold_in_memory_and_warm(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    dataset_index.main(
        ["--images", "20", "--folder", str(tmp_path / "images"), "--json", str(tmp_path / "report.json")]
    )
    rows = rows_of(capsys)
    assert [row["what"] for row in rows] == ["cold", "in memory", "warm"]
    assert all(row["images"] == 20 and row["index_seconds"] > 0 and row["index_peak_mib"] > 10 for row in rows)
    assert json.loads((tmp_path / "report.json").read_text())["index_cache_mb"] is not None
    listing = f"{sys.executable} -c 'import os, sys; os.listdir(sys.argv[1])' {{folder}}"
    dataset_index.main(["--images", "20", "--folder", str(tmp_path / "images"), "--rounds", "1", "--against", listing])
    assert rows_of(capsys)[2]["seconds"] > 0
