"""LocalObjects: objects in a folder of this machine, for any number of its threads and processes.

{root}/{key}                  an object: complete at every moment, whoever is killed
{root}/.writing/{shard}.lock  held by the one writer of the shard's keys; the system lets go of a killed one's
{root}/.writing/{shard}.new   what the writer writes before it takes the object's place; a killed one's is removed
                              by the next

Only the account of the service can read any of it, whatever its umask: photos and what is made of faces lie here.
"""

import errno
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import StoreError, StoreMisconfigured, StoreUnavailable
from pipeline.objects import JSON, KEY, Entry, Object, checked_key, honours_conditions, overtaken

SHARDS = 256
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
RACES = 100  # lost in a row against those who remove an empty folder
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class LocalObjects:
    """Objects as files; see pipeline.objects.Objects.

    The version of an object is its file's number, time and size, so that a listing reads no file. Each write is another
    file, and never older than the one whose place it takes: no version comes back.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser().absolute()
        self._writing = self._root / ".writing"

    def check(self) -> None:
        """See Objects; also removes what killed writers have left. Raises StoreMisconfigured, StoreUnavailable."""
        if not honours_conditions(self):
            raise StoreMisconfigured(
                f"The disk of {self._root} does not keep its writers apart; set PULID_STORE__URL to a disk of this "
                "machine."
            )
        with self._faults():
            for left in self._writing.glob("*.new"):
                with self._locked(left.stem):
                    left.unlink(missing_ok=True)

    def create(self, key: str, data: bytes, media_type: str = JSON) -> str:  # noqa: ARG002
        """See Objects."""
        return self._write(key, data, None)

    def replace(self, key: str, data: bytes, etag: str, media_type: str = JSON) -> str:  # noqa: ARG002
        """See Objects."""
        return self._write(key, data, etag)

    def get(self, key: str) -> Object | None:
        """See Objects."""
        path = self._path(key)
        with self._faults():
            try:
                with path.open("rb") as file:  # which stays what it is: another write is another file
                    return Object(file.read(), _etag(os.fstat(file.fileno())))
            except (FileNotFoundError, IsADirectoryError):
                return None

    def delete(self, key: str) -> None:
        """See Objects. Folders that are empty then go too."""
        path = self._path(key)
        with self._faults(), self._locked(_shard(key)):
            try:
                folder = os.open(path.parent, os.O_RDONLY)
            except FileNotFoundError:
                return
            try:
                os.unlink(path.name, dir_fd=folder)
                _sync(folder)
            except FileNotFoundError:
                return
            finally:
                os.close(folder)
            self._remove_empty(path.parent)

    def list(self, prefix: str) -> Iterator[Entry]:
        """See Objects. Reads no object, and only folders in which there may be one."""
        folder = prefix.rpartition("/")[0]
        with self._faults():
            yield from self._walk(checked_key(folder) if folder else "", prefix)

    def link(self, key: str, media_type: str, file_name: str) -> str | None:  # noqa: ARG002
        """None: a folder has no addresses for others."""
        return None

    def _path(self, key: str) -> Path:
        return self._root / checked_key(key)

    def _write(self, key: str, data: bytes, expected: str | None) -> str:
        """Write where version `expected` is (None: where nothing is), unless the same bytes are there already."""
        path = self._path(key)
        with self._faults(), self._locked(_shard(key)) as workspace:
            found = _stat(path)
            if found is not None and found.st_size == len(data) and path.read_bytes() == data:
                return _etag(found)
            if (None if found is None else _etag(found)) != expected:
                raise overtaken()
            try:
                etag = _written(workspace, data, after=found)
                self._place(workspace, path)
            except BaseException:
                workspace.unlink(missing_ok=True)
                raise
        return etag

    def _place(self, workspace: Path, path: Path) -> None:
        for left in reversed(range(RACES)):
            try:
                _make_folder(path.parent)
                workspace.replace(path)
                break
            except FileNotFoundError:  # the folder was empty, and somebody has removed it
                if not left:
                    raise
        for folder in path.parents:  # each may be new, and its name is the content of the one above
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                _sync(descriptor)
            finally:
                os.close(descriptor)
            if folder == self._root:
                break

    def _remove_empty(self, folder: Path) -> None:
        while folder != self._root:
            try:
                folder.rmdir()
            except OSError:  # it holds something, or is gone
                return
            folder = folder.parent

    def _walk(self, folder: str, prefix: str) -> Iterator[Entry]:
        """The objects below a folder, in the order of their keys."""
        start = f"{folder}/" if folder else ""
        try:
            with os.scandir(self._root / folder) as found:
                keys = sorted(f"{start}{entry.name}{'/' if entry.is_dir() else ''}" for entry in found)
        except FileNotFoundError:
            return
        for key in keys:  # a folder's sorts as its content does, by its slash
            if KEY.fullmatch(key.removesuffix("/")) is None:
                continue
            if key.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key[:-1], prefix)
            elif key.startswith(prefix) and (kept := _stat(self._root / key)) is not None:
                yield Entry(key, _etag(kept))

    @contextmanager
    def _locked(self, shard: str) -> Iterator[Path]:
        """Keep all other writers of a shard out; gives the file to write before it takes an object's place."""
        _make_folder(self._writing)
        descriptor = _open(self._writing / f"{shard}.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield self._writing / f"{shard}.new"
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a forked child has it too
            os.close(descriptor)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _fault(error, self._root) from error


def _etag(found: os.stat_result) -> str:
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"


def _stat(path: Path) -> os.stat_result | None:
    """What is known of a file; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return None if stat.S_ISDIR(found.st_mode) else found


def _written(workspace: Path, data: bytes, after: os.stat_result | None) -> str:
    """Bring bytes to the disk in a file that is newer than the one whose place it will take; returns its version."""
    workspace.unlink(missing_ok=True)  # of a killed writer; never the same file twice
    with open(_open(workspace, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(data)
        file.flush()
        found = _dated(file.fileno(), after)
        os.fsync(file.fileno())
        return _etag(found)


def _dated(descriptor: int, after: os.stat_result | None) -> os.stat_result:
    """Give a file the time that it is now, which is finer than what the system would, or a later one than `after`."""
    now, grain = time.time_ns(), 1
    while True:
        os.utime(descriptor, ns=(now, now))
        found = os.fstat(descriptor)
        if after is None or found.st_mtime_ns > after.st_mtime_ns:
            return found
        now, grain = after.st_mtime_ns + grain, grain * 1000  # some disks keep microseconds or seconds alone


def _open(path: Path, flags: int) -> int:
    """Open a file; one that is new is private."""
    return os.open(path, flags, PRIVATE_FILE)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it; those that are new are private, all others stay as they are."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        with suppress(FileExistsError):  # another was quicker
            new.mkdir(PRIVATE_FOLDER)


def _shard(key: str) -> str:
    return f"{hashlib.sha256(key.encode()).digest()[0] % SHARDS:02x}"


def _sync(descriptor: int) -> None:
    """Bring a folder's names to the disk; they are its own content, synced apart from the files."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # fsync(2): this file system does not sync folders, and need not
            raise


def _fault(error: OSError, root: Path) -> StoreError:
    if error.errno in NO_ROOM:
        return StoreUnavailable(f"There is no room left for pictures in {root}; free some, or set PULID_STORE__URL.")
    if error.errno in NOT_WRITABLE:
        return StoreMisconfigured(f"Pictures cannot be kept in {root} ({error.strerror}); set PULID_STORE__URL.")
    if error.errno in NO_LOCKS:
        return StoreMisconfigured(f"Files cannot be locked in {root}; set PULID_STORE__URL to a disk that can.")
    return StoreUnavailable(f"The disk of {root} failed ({error.strerror}); try again.")
