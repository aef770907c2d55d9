"""Uploads and downloads against a local fake of the Hub's HTTP API, through huggingface_hub's own client."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.common.errors import UserError
from library.saving.hub import HubSettings, HubUploader, fetch_state
from tests.fake_hub import FakeHub


def settings(**changes) -> HubSettings:
    return HubSettings("me/lora", token="hf_secret", seconds_before_retry=0.01, **changes)


def test_files_and_folders_arrive_under_their_names(hub: FakeHub, tmp_path: Path):
    (tmp_path / "x-state").mkdir()
    (tmp_path / "x-state" / "train_state.json").write_text("{}")
    (tmp_path / "x.safetensors").write_bytes(b"weights")
    with HubUploader(settings()) as uploader:
        uploader.submit(tmp_path / "x.safetensors")
        assert hub.repos["me/lora"]["x.safetensors"] == b"weights"  # not in the background: done when submit returns
        uploader.submit(tmp_path / "x-state")
    assert set(hub.repos["me/lora"]) >= {"x.safetensors", "x-state/train_state.json"}
    assert hub.private["me/lora"] is True
    assert hub.tokens == {"Bearer hf_secret"}


def test_the_folder_in_the_repository_is_a_prefix_and_public_is_public(hub: FakeHub, tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(b"weights")
    with HubUploader(settings(path_in_repo="runs/1/", private=False, in_background=True)) as uploader:
        uploader.submit(tmp_path / "x.safetensors")
    assert "runs/1/x.safetensors" in hub.repos["me/lora"]
    assert hub.private["me/lora"] is False


def test_a_failing_upload_is_tried_again_and_never_raises(hub: FakeHub, tmp_path: Path, caplog):
    (tmp_path / "x.safetensors").write_bytes(b"weights")
    with HubUploader(settings()) as uploader:
        uploader.api.upload_file, plain, calls = None, uploader.api.upload_file, []

        def flaky(**arguments):
            calls.append(arguments)
            if len(calls) < 3:
                raise OSError("the hub has hiccups")
            return plain(**arguments)

        uploader.api.upload_file = flaky
        uploader.submit(tmp_path / "x.safetensors")
        assert hub.repos["me/lora"]["x.safetensors"] == b"weights" and len(calls) == 3
        calls.clear()
        uploader.api.upload_file = lambda **arguments: (_ for _ in ()).throw(OSError("gone"))
        uploader.submit(tmp_path / "x.safetensors")
    assert "given up" in caplog.text
    assert "hf_secret" not in caplog.text


def test_a_hub_that_cannot_be_reached_is_said_before_training(hub: FakeHub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match="cannot be reached or made"):
        HubUploader(settings())
    assert "hf_secret" not in repr(settings())


def test_a_state_is_fetched(hub: FakeHub, tmp_path: Path):
    hub.repos["me/lora"] = {
        "runs/x-state/train_state.json": b"{}",
        "runs/x-state/model.safetensors": b"w",
        "other.bin": b"o",
    }
    folder = fetch_state("me/lora/runs/x-state", tmp_path, None)
    assert (folder / "train_state.json").read_bytes() == b"{}" and (folder / "model.safetensors").read_bytes() == b"w"
    assert not (tmp_path / "other.bin").exists()


@pytest.mark.parametrize("wanted", ["state", "me/lora", "me/lora/"])
def test_a_malformed_place_is_explained(wanted: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"user/repo/path"):
        fetch_state(wanted, tmp_path, None)


def test_a_repository_that_is_not_there_is_said(hub: FakeHub, tmp_path: Path):
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch_state("me/none/x-state", tmp_path, None)
