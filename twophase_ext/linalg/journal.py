"""What of a tile computation is on disk: an append-only journal beside the tile file.

A line is one JSON array that ends in the CRC-32 of what stands before it, added after the tile it
speaks of was written. After a kill the last line may be torn, and after a power cut a tile may be:
a line that its checksum does not fit is dropped with all that follow, torn tiles are found by
theirs.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .tiles import FileTiles, Tiles, checksum

START = b'["header", '


class Journal:
    """Lines of one computation; a file of another one is refused, or begun anew."""

    def __init__(self, path: Path, header: dict[str, Any], resume: bool | str) -> None:
        """header: plain JSON that identifies the computation; resume=False starts anew, "own" where
        the file is another computation's.

        Raises ValueError where `path` belongs to another header, RuntimeError where another
        process uses it.
        """
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RuntimeError(f"{path}: another process computes in this folder") from error
            self.records = self._load(path, header, resume == "own") if resume else []
        except BaseException:
            os.close(self._file)
            raise
        if not self.records:
            os.ftruncate(self._file, 0)
            self.add("header", header)

    def _load(self, path: Path, header: dict[str, Any], anew: bool) -> list[list[Any]]:
        records: list[list[Any]] = []
        good = 0
        lines = path.read_bytes().splitlines(keepends=True)
        for line in lines:
            record = _intact(line)
            if record is None:
                break
            records.append(record)
            good += len(line)
        torn = not lines or (lines[0].startswith(START) and not lines[0].endswith(b"\n"))
        if not torn and (not records or records[0][0] != "header"):
            raise ValueError(f"folder: {path} is damaged or no journal; remove it to start anew")
        if records and records[0] != ["header", header]:
            if anew:
                return []
            other = records[0][1]
            differ = [name for name in header if other.get(name) != header[name]]
            raise ValueError(
                f"folder: {path} belongs to another computation: "
                + ", ".join(f"{k} is {other.get(k)!r} there, {header[k]!r} here" for k in differ)
            )
        os.ftruncate(self._file, good)
        return records

    def add(self, *record: Any) -> None:
        """Append one line, in one write."""
        os.write(self._file, (json.dumps([*record, _crc(record)]) + "\n").encode())
        self.records.append(list(record))

    def find(self, name: str) -> list[Any] | None:
        """The last record of this name."""
        return next((r for r in reversed(self.records) if r[0] == name), None)

    def close(self) -> None:
        """Let another process resume."""
        os.close(self._file)


def _crc(record: Sequence[Any]) -> int:
    return zlib.crc32(json.dumps(list(record)).encode())


def _intact(line: bytes) -> list[Any] | None:
    """The record of a whole line whose checksum fits, else None."""
    try:
        *record, crc = json.loads(line)
        fits = line.endswith(b"\n") and crc == _crc(record)
    except (ValueError, TypeError, RecursionError):
        return None
    return record if fits and record else None


class RecordedTiles:
    """Tiles in a store, and where there is a journal also in its file, line by line."""

    def __init__(
        self, name: str, store: Tiles, file: FileTiles | None, journal: Journal | None
    ) -> None:
        """store: may be `file` itself. name: of the journal's lines, such as "G"."""
        self.name, self.grid = name, store.grid
        self._store, self._file, self._journal = store, file, journal

    @property
    def recorded(self) -> bool:
        """Whether tiles outlive the process."""
        return self._journal is not None

    def read(self, i: int, j: int) -> Tensor:
        """Tile (i, j) on the device that computes."""
        return self._store.read(i, j)

    def write(self, i: int, j: int, tile: Tensor, note: float = 0.0) -> None:
        """Keep tile (i, j), and `note` with it."""
        if self._file is not None and self._journal is not None:
            self._file.write(i, j, tile)
            self._journal.add(self.name, i, j, checksum(tile), note)
        if self._store is not self._file:
            self._store.write(i, j, tile)

    def restore(self) -> dict[tuple[int, int], float]:
        """The note of every tile in the journal whose checksum holds; those are in the store."""
        if self._file is None or self._journal is None:
            return {}
        lines: dict[tuple[int, int], tuple[int, float]] = {}
        for record in self._journal.records:
            if record[0] == self.name:
                lines[record[1], record[2]] = record[3], record[4]
            elif record[:2] == ["forget", self.name]:
                lines = {(i, j): line for (i, j), line in lines.items() if j < record[2]}
        notes = {}
        for (i, j), (expected, note) in lines.items():
            tile = self._file.read(i, j)
            if checksum(tile) == expected:
                notes[i, j] = note
                if self._store is not self._file:
                    self._store.write(i, j, tile)
        return notes

    def forget(self, column: int) -> None:
        """The tiles from this tile column on are no longer good."""
        if self._journal is not None:
            self._journal.add("forget", self.name, column)
