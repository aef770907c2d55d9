"""Every tool answers --help under its own name, as a script from any folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "tools"
# One process for all tools, torch being slow to import; our own modules are forgotten between them.
ASK = """
import contextlib, io, json, runpy, sys
path, actual = list(sys.path), {}
for tool in sys.argv[1:]:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("library", "networks", "tools")]:
        del sys.modules[name]
    sys.path[:], sys.argv = [tool.rpartition("/")[0], *path[1:]], [tool, "--help"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(tool, run_name="__main__")
        except SystemExit as stop:
            actual[tool] = [stop.code or 0, said.getvalue()]
print(json.dumps(actual))
"""


def test_every_tool_tells_its_options_under_its_own_name(tmp_path: Path) -> None:
    tools = [path.as_posix() for path in sorted(TOOLS.rglob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
    done = subprocess.run(
        [sys.executable, "-c", ASK, *tools], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    actual = json.loads(done.stdout)
    assert actual.keys() == set(tools) and len(tools) > 12
    for tool, (code, said) in actual.items():
        assert code == 0 and said.startswith(f"usage: {Path(tool).name} "), (tool, said[:200])
