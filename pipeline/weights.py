"""Weights: the files of a preset: find them, fetch them, verify them.

The table is presets.py; `manifest.json` beside the files is the memory of what was verified (manifest.py). A file whose
sha256 the table does not know is trusted the first time it is fetched, and held to its manifest entry from then on.
Where everything is there and verified, nothing connects and nothing is written.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.download import Downloader, Progress, Wanted, fetched, locked, place, sha256, unpack
from pipeline.errors import LicenceNotAccepted, WeightsCorrupt, WeightsMissing
from pipeline.manifest import Manifest, below
from pipeline.presets import PRESETS, Archive, Host, Licence, ModelFile, ModelSpec, Preset
from pipeline.settings import Settings

__all__ = ["PRESETS", "Archive", "Finding", "Licence", "ModelFile", "ModelSpec", "Preset", "Source", "WeightFiles"]
__all__ += ["fetch", "findings", "locate", "verify"]

HUB, UNVERIFIED = "https://huggingface.co", "unverified"
SHIPPED = Path(__file__).parent / "miniature" / "weights"
SPARE = 100_000_000  # bytes that a fetch leaves free on the disk
State = Literal["verified", "unverified", "missing", "corrupt"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where files are fetched from, and how patiently; `token` is shown to the hub and to nobody else."""

    hub: str = HUB
    github: str = "https://github.com"
    token: str | None = field(default=None, repr=False)
    attempts: int = 6
    pause: Callable[[float], None] = time.sleep

    def address(self, host: Host, repository: str, revision: str, name: str) -> str:
        """The address of one file."""
        if host == "hub":
            return f"{self.hub}/{repository}/resolve/{revision}/{name}"
        return f"{self.github}/{repository}/releases/download/{revision}/{name}"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known about one file. `size`: in bytes, perhaps rounded; `pinned`: the table knows its sha256."""

    spec: ModelSpec
    file: str
    state: State
    size: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Where a preset's files are; `flux_file` takes the place of the role flux."""

    preset: Preset
    manifest: Manifest
    flux_file: Path | None = None

    @property
    def root(self) -> Path:
        """The preset's folder."""
        return self.manifest.root

    def path(self, role: str) -> Path:
        """The file or folder of a role. Raises WeightsMissing, and WeightsCorrupt where a file's size is wrong."""
        members = self.members(role)
        for path, file in members.items():
            if not path.exists():
                raise WeightsMissing(f"{path} is missing; {self.mend(path)}.")
            if path.is_file() and file.size not in (None, path.stat().st_size):
                raise WeightsCorrupt(f"{path} has {path.stat().st_size} bytes, not {file.size}; {self.mend(path)}.")
        if self._is_given(role) and self.flux_file is not None:
            return self.flux_file
        folder = self.root / self.spec(role).folder
        return next(iter(members)) if len(self.spec(role).files) == 1 else folder

    def hashes(self, *roles: str) -> dict[str, str]:
        """The files of roles, relative to the preset's folder -> sha256, or "unverified" where nobody checked it.

        Only a file that changed since it was verified is read. Raises WeightsMissing, WeightsCorrupt.
        """
        found: dict[str, str] = {}
        for role in roles:
            self.path(role)
            for path, file in self.members(role).items():
                entry = self.manifest.entries.get(self.name(path)) if path.is_relative_to(self.root) else None
                if entry and (
                    file.sha256 not in (None, entry.sha256)
                    or not (entry.is_unchanged(path) or sha256(path) == entry.sha256)
                ):
                    raise WeightsCorrupt(f"{path} is not the file that was verified; {self.mend(path)}.")
                found[self.name(path)] = entry.sha256 if entry else UNVERIFIED
        return found

    def has(self, role: str) -> bool:
        """Whether the preset has a model for a role at all."""
        return any(spec.role == role for spec in self.preset.specs)

    def spec(self, role: str) -> ModelSpec:
        """The table's row. Raises WeightsMissing where the preset has none."""
        for spec in self.preset.specs:
            if spec.role == role:
                return spec
        raise WeightsMissing(f"The preset {self.preset.name} has no file for the role {role}; choose another preset.")

    def members(self, role: str) -> dict[Path, ModelFile]:
        """The files of a role, there or not, and what the table knows of each; a folder that is not there, itself."""
        spec, folder = self.spec(role), self.root / self.spec(role).folder
        if self._is_given(role) and self.flux_file is not None:
            part = self.flux_file / "transformer"  # a whole pipeline's folder: nothing else of it is read
            paths = below(part if part.is_dir() else self.flux_file) or [self.flux_file]
        elif spec.files:
            return {folder / file.name: file for file in spec.files}
        else:
            known = [self.root / name for name in self.manifest.entries if name.startswith(f"{spec.folder}/")]
            paths = sorted({*known, *below(folder)}) or [folder]
        return {path: ModelFile(path.name) for path in paths}

    def name(self, path: Path) -> str:
        """A file's name in records: no path of this machine, but enough to tell config.json from config.json."""
        if path.is_relative_to(self.root) or self.flux_file is None:
            return path.relative_to(self.root).as_posix()
        return path.relative_to(self.flux_file.parent).as_posix()

    def _is_given(self, role: str) -> bool:
        return role == "flux" and self.flux_file is not None

    def mend(self, path: Path) -> str:
        """What to do about a file of this preset that is missing or damaged, to end a sentence with."""
        if self.flux_file is not None and path.is_relative_to(self.flux_file):
            return "point PULID_FLUX_FILE at FLUX's file or folder"
        if self.preset.shipped:
            return "install this package anew, or point PULID_MINIATURE_DIR at a complete miniature"
        return f"run `pulid weights fetch --preset {self.preset.name}`"


def locate(settings: Settings, preset: Preset | None = None) -> WeightFiles:
    """The files of the preset that is set, looked up when they are asked for. Raises WeightsCorrupt (the manifest)."""
    preset = preset or PRESETS[settings.preset]
    flux_file = None if settings.flux_file is None else settings.flux_file.expanduser()
    folder = (settings.miniature_dir or SHIPPED) if preset.shipped else settings.weights_dir
    return WeightFiles(preset, Manifest.read(folder.expanduser()), flux_file)


def verify(settings: Settings, preset: Preset | None = None) -> list[Finding]:
    """What is known about every file after reading all of it; writes nothing. Raises WeightsCorrupt (the manifest)."""
    return list(findings(settings, preset, read=True))


def findings(settings: Settings, preset: Preset | None = None, read: bool = False) -> Iterator[Finding]:
    """One finding per file. Without `read`, a file that did not change since it was verified counts as verified."""
    files = locate(settings, preset)
    read = read or files.preset.shipped  # they are small, and a checkout gives them other times
    for spec in files.preset.specs:
        for path, file in files.members(spec.role).items():
            size = path.stat().st_size if path.is_file() else file.room
            yield Finding(spec, files.name(path), _state(files, path, file, read), size, file.sha256 is not None)


def _state(files: WeightFiles, path: Path, file: ModelFile, read: bool) -> State:
    if not path.is_file():
        return "missing"
    entry = files.manifest.entries.get(files.name(path)) if path.is_relative_to(files.root) else None
    known = file.sha256 or (entry and entry.sha256)
    if file.size not in (None, path.stat().st_size) or (entry and entry.sha256 != known):
        return "corrupt"
    if not read and (entry is None or not entry.is_unchanged(path)):
        return "unverified"
    if read and known and sha256(path) != known:
        return "corrupt"
    return "verified" if known else "unverified"


def fetch(
    settings: Settings,
    accept_licences: bool = False,
    progress: Progress = lambda *_: None,
    source: Source | None = None,
    preset: Preset | None = None,
) -> list[str]:
    """Fetch what is missing or damaged, and remember what is there; returns the names of the files that came.

    Raises LicenceNotAccepted before anything is fetched where a file is gated or not free for commercial use and
    `accept_licences` is false; WeightsMissing; WeightsCorrupt.
    """
    if not _todo(locate(settings, preset)):
        return []
    source = source or Source()
    root = locate(settings, preset).root
    with locked(root / ".lock"):
        files = locate(settings, preset)  # another process may have fetched while this one waited
        _adopt(files)
        todo = _todo(files)
        if not accept_licences:
            _require_licences(spec for spec, _ in todo)
        _require_room(files, todo)
        with Downloader(source.attempts, source.pause) as downloader:
            for spec, file in todo:
                if (spec, file) in _todo(files):  # an archive brings several at once
                    _obtain(files, spec, file, _Way(downloader, source, progress))
    return [f"{spec.folder}/{file.name}" for spec, file in todo]


@dataclass(frozen=True, slots=True)
class _Way:
    downloader: Downloader
    source: Source
    progress: Progress


def _todo(files: WeightFiles) -> list[tuple[ModelSpec, ModelFile]]:
    """The files that are not known to be good, without reading any."""
    return [
        (spec, file)
        for spec in files.preset.specs
        if spec.repository and not (spec.role == "flux" and files.flux_file)
        for path, file in files.members(spec.role).items()
        if _state(files, path, file, read=False) != "verified"
    ]


def _adopt(files: WeightFiles) -> None:
    """Read files that somebody put there, or copied, and remember those that are what they should be."""
    for spec, file in _todo(files):
        path = files.root / spec.folder / file.name
        if path.is_file() and file.size in (None, path.stat().st_size):
            digest = sha256(path)
            entry = files.manifest.entries.get(files.name(path))
            if digest == (file.sha256 or (entry.sha256 if entry else digest)):
                files.manifest.record(files.name(path), digest)


def _require_licences(specs: Iterable[ModelSpec]) -> None:
    closed = {
        f"{spec.licence.name} ({spec.licence.page})": None
        for spec in specs
        if spec.gated or not spec.licence.commercial
    }
    if closed:
        raise LicenceNotAccepted(
            "These licences have to be read and accepted first; nothing was fetched: "
            + "; ".join(closed)
            + ". If you accept them, run it again with --accept-licences."
        )


def _require_room(files: WeightFiles, todo: Iterable[tuple[ModelSpec, ModelFile]]) -> None:
    need = sum(file.room - fetched(files.root / spec.folder / file.name) for spec, file in todo)
    free = shutil.disk_usage(files.root).free
    if todo and need + SPARE > free:
        raise WeightsMissing(
            f"The files need {need / 1e9:.1f} GB more, and the disk of {files.root} has {free / 1e9:.1f} GB left. Make "
            "room, or set PULID_WEIGHTS_DIR to a folder on another disk."
        )


def _obtain(files: WeightFiles, spec: ModelSpec, file: ModelFile, way: _Way) -> None:
    name = f"{spec.folder}/{file.name}"
    entry = files.manifest.entries.get(name)
    address = way.source.address(spec.host, spec.repository or "", spec.revision, file.name)
    token = way.source.token if spec.host == "hub" else None
    page = spec.licence.page if spec.gated else None
    expected = file.sha256 or (entry.sha256 if entry else None)
    wanted = Wanted(address, files.root / name, expected, file.size, token, page)
    if spec.archive and (files.root / spec.folder / spec.archive.file.name).exists():
        _obtain_from(spec.archive, files, spec.folder, way)
        return
    try:
        files.manifest.record(name, way.downloader.get(wanted, way.progress))
    except WeightsMissing:
        if spec.archive is None:
            raise
        _obtain_from(spec.archive, files, spec.folder, way)


def _obtain_from(archive: Archive, files: WeightFiles, folder: str, way: _Way) -> None:
    """Put all that a zip has for the preset in its place. The zip is fetched, or, where somebody put it there, kept."""
    target = files.root / folder / archive.file.name
    brought = not target.exists()
    if brought:
        address = way.source.address("github", archive.repository, archive.revision, archive.file.name)
        way.downloader.get(Wanted(address, target, archive.file.sha256, archive.file.size), way.progress)
    rows = {file.name: file for spec in files.preset.specs if spec.archive == archive for file in spec.files}
    for part in unpack(target, target.parent, {name: file.size for name, file in rows.items()}):
        path = part.with_suffix("")
        digest = sha256(part)
        if digest != (rows[path.name].sha256 or digest):
            part.unlink()
            raise WeightsCorrupt(f"{path.name} in {target.name} is another file than expected. Do not use it.")
        place(part, path)
        files.manifest.record(files.name(path), digest)
    if brought:
        target.unlink()
