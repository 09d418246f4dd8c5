"""Manifest: the memory of which model files were verified, as `manifest.json` in their folder.

    {"files": {"relative/path": {"sha256": "<64 hex digits>", "size": 123, "mtime_ns": 456}}}

A file with the size and the time of change of its entry is taken as verified without being read again; `mtime_ns` may
be absent, and the file is then read.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from pipeline.download import place
from pipeline.errors import WeightsCorrupt

FILE = "manifest.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as it was when it was verified."""

    sha256: str
    size: int
    mtime_ns: int | None = None

    def is_unchanged(self, path: Path) -> bool:
        """Whether the file still looks as it did then."""
        status = path.stat()
        return (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The entries of one folder; names are relative to it, with slashes."""

    root: Path
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> Self:
        """The folder's manifest; empty where there is none. Raises WeightsCorrupt."""
        path = root / FILE
        if not path.exists():
            return cls(root)
        try:
            files = json.loads(path.read_text())["files"]
            return cls(root, {name: Entry(**entry) for name, entry in files.items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsCorrupt(
                f"{path} is not readable. Remove it and run `pulid weights fetch`, which reads the files anew."
            ) from error

    def record(self, name: str, digest: str) -> None:
        """Remember a file as verified, and write the manifest."""
        status = (self.root / name).stat()
        self.entries[name] = Entry(digest, status.st_size, status.st_mtime_ns)
        self.write()

    def write(self) -> None:
        """Write the manifest, at once."""
        text = json.dumps({"files": {name: asdict(entry) for name, entry in sorted(self.entries.items())}}, indent=1)
        part = self.root / f".{FILE}.{os.getpid()}"
        part.write_text(text + "\n")
        place(part, self.root / FILE)


def below(path: Path) -> list[Path]:
    """The files of a folder, in order, or the file itself; hidden files and folders stay out."""
    if path.is_file():
        return [path]
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts))
