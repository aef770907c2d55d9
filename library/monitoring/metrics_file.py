"""The metrics of a run as a file, one JSON object a line, and the curves that are drawn from it."""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO, cast

from library.common.files import write_text

logger = logging.getLogger(__name__)
NOT_A_CURVE = frozenset(["step", "epoch", "index"])
Record = Mapping[str, object]
"""A line of the file: "step", and numbers and texts by name."""


class Curves:
    """Every number of the records over steps, by name. It is added to by one thread and may be read by another."""

    def __init__(self) -> None:
        self._columns: dict[str, tuple[array[int], array[float]]] = {}

    def add(self, record: Record) -> None:
        for name, value in record.items():
            if name not in NOT_A_CURVE and isinstance(value, (int, float)) and not isinstance(value, bool):
                steps, values = self._columns.setdefault(name, (array("q"), array("d")))
                values.append(value)
                steps.append(cast(int, record["step"]))

    def names(self) -> list[str]:
        return list(self._columns)

    def __getitem__(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values; two empty lists for a name that has none."""
        steps, values = self._columns.get(name, (array("q"), array("d")))
        count = len(steps)
        return steps[:count].tolist(), values[:count].tolist()


class MetricsFile:
    """Lines of JSON, written at once. A resumed run continues the file where its state was saved; a new one starts a new file."""

    def __init__(self, path: Path):
        self.path = path
        self._file: TextIO | None = None

    def open(self, step: int) -> list[Record]:
        """Open the file for a run that has done `step` steps, and return the records of those, which stay in it."""
        kept = [record for record in self._read() if cast(int, record.get("step", step + 1)) <= step] if step else []
        write_text(self.path, "".join(_line(record) for record in kept))
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        return kept

    def write(self, record: Record) -> None:
        """A record that cannot be written, on a full disk say, ends the file and not the run."""
        if self._file is None:
            return
        try:
            self._file.write(_line(record))
        except OSError as error:
            logger.warning("%s: no more can be written (%s); training goes on without it", self.path, error)
            self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # it still holds what could not be written, which was reported
                file.close()

    def _read(self) -> Iterator[Record]:
        """The whole records; a line that a crash cut short is left out."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _line(record: Record) -> str:
    """Numbers that are not finite become null: NaN is no JSON."""
    plain = {
        key: None if value in (float("inf"), float("-inf")) or value != value else value
        for key, value in record.items()
    }
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"
