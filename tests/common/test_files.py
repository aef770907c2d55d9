"""Files are whole or not there, and the same content makes the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from library.common.files import atomic_write, save_safetensors, write_text
from library.common.processes import remove_stale_temporaries


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_equal_content_makes_equal_bytes_whatever_the_order_of_metadata(tmp_path):
    tensors = {"b": torch.arange(4.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    metadata = {f"ss_{i}": f'猫 "{i}"\n\t\x01é' for i in range(40)}
    save_safetensors(tmp_path / "1.safetensors", tensors, metadata)
    save_safetensors(tmp_path / "2.safetensors", tensors, dict(reversed(metadata.items())))
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    with safe_open(str(tmp_path / "1.safetensors"), "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("b"), tensors["b"])


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX file modes")
def test_files_are_for_those_whom_the_umask_allows_and_keep_the_mode_that_they_had(tmp_path):
    """The safetensors library makes its files private, which another user's ComfyUI could not read."""
    tensors = {"a": torch.ones(2)}
    before = os.umask(0o027)
    try:
        save_safetensors(tmp_path / "a.safetensors", tensors)
        write_text(tmp_path / "a.txt", "text")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a.safetensors", "a.txt")] == [0o640, 0o640]
    (tmp_path / "a.safetensors").chmod(0o604)
    save_safetensors(tmp_path / "a.safetensors", tensors)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o604


def test_a_process_killed_while_it_tests_a_folder_leaves_a_file_that_the_next_one_removes(tmp_path):
    lines = (
        "import os, sys, pathlib",
        "from library.common.files import check_writing",
        "pathlib.Path.unlink = lambda *a, **k: os._exit(9)",
        "check_writing(pathlib.Path(sys.argv[1]))",
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", "\n".join(lines), str(tmp_path)], cwd=root).returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    assert len(remove_stale_temporaries([tmp_path])) == 1
    assert not list(tmp_path.iterdir())
