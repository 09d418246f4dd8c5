"""Objects: conditional writes in a folder, whoever is killed, and in S3, whatever is lost on the way."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Barrier

import pytest

from pipeline.errors import StoreConflict, StoreCorrupt, StoreMisconfigured, StoreUnavailable
from pipeline.objects_local import LocalObjects
from pipeline.objects_s3 import S3Objects
from tests import s3
from tests.s3 import failing, refuses, s3_settings

KEYS = (f"tests/{number}.json" for number in count())
MANY = 16
ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["folder", "s3"], scope="module")
def objects(request, tmp_path_factory, s3_endpoint):
    if request.param == "folder":
        yield LocalObjects(tmp_path_factory.mktemp("objects"))
    else:
        with failing(s3_endpoint, otherwise=s3.one_at_a_time()) as proxy:
            yield S3Objects(s3_settings(proxy.endpoint))


@pytest.fixture
def key():
    return next(KEYS)


@contextmanager
def behind(s3_endpoint, *faults, otherwise=s3.passes, **changes):
    """S3 whose first calls meet faults."""
    with failing(s3_endpoint, *faults, otherwise=otherwise) as proxy:
        yield S3Objects(s3_settings(proxy.endpoint, **changes)), proxy


def listed(objects, prefix):
    return [entry.key for entry in objects.list(prefix)]


def test_what_was_written_is_read_with_its_version(objects, key):
    """An object is what was written last, under the version that the write has told, until it is deleted."""
    objects.check()
    assert objects.get(key) is None
    first = objects.create(key, b"one")
    assert (objects.get(key).data, objects.get(key).etag) == (b"one", first)
    second = objects.replace(key, b"two", first)
    assert (objects.get(key).data, objects.get(key).etag) == (b"two", second)
    assert [(entry.key, entry.etag) for entry in objects.list(key)] == [(key, second)]
    for _ in range(2):
        objects.delete(key)
        assert objects.get(key) is None
    assert listed(objects, key) == []


def test_who_comes_too_late_is_refused(objects, key):
    """Neither what exists is created, nor a version replaced that is another's or gone; what is there stays."""
    first = objects.create(key, b"one")
    second = objects.replace(key, b"two", first)
    for late in (lambda: objects.create(key, b"three"), lambda: objects.replace(key, b"three", first)):
        with pytest.raises(StoreConflict):
            late()
        assert objects.get(key).data == b"two"
    objects.delete(key)
    with pytest.raises(StoreConflict):
        objects.replace(key, b"three", second)
    assert objects.get(key) is None


def test_the_same_write_again_is_no_conflict(objects, key):
    """Who finds the bytes that it wants to write has written them before, as far as anybody can tell."""
    first = objects.create(key, b"one")
    assert objects.create(key, b"one") == first
    second = objects.replace(key, b"two", first)
    assert objects.replace(key, b"two", first) == second


@pytest.mark.parametrize("what", ["create", "replace"])
def test_of_many_threads_one_wins(objects, key, what):
    """Of 16 writers at once exactly one is told that it has written, and its bytes are there."""
    etag = objects.create(key, b"first") if what == "replace" else None
    together = Barrier(MANY)

    def write(number):
        together.wait()
        try:
            if etag is None:
                objects.create(key, b"%d" % number)
            else:
                objects.replace(key, b"%d" % number, etag)
        except StoreConflict:
            return None
        return b"%d" % number

    with ThreadPoolExecutor(MANY) as pool:
        winners = [won for won in pool.map(write, range(MANY)) if won is not None]
    assert winners == [objects.get(key).data]


@pytest.mark.parametrize(
    "key", ["", "/", "/a", "a/", "a//b", "../a", "a/../b", ".writing/00.new", "a/.b", "a b", "a\n", "ä"]
)
def test_keys_that_are_none_are_refused(objects, key):
    """A key is made of segments of [A-Za-z0-9._-] that do not begin with a dot."""
    for use in (lambda: objects.create(key, b""), lambda: objects.get(key), lambda: objects.delete(key)):
        with pytest.raises(ValueError, match="segments"):
            use()


def test_lists_are_in_the_order_of_keys(objects):
    """What begins with a prefix, that alone, ordered by its bytes; folders are no objects."""
    names = ["a/1-2", "a/1.json", "a/1/x", "a/10", "a/1a/y/z", "a/2", "a-b", "a0", "aa/1", "b"]
    for name in reversed(names):
        objects.create(f"order/{name}", name.encode())
    assert listed(objects, "order/") == sorted(f"order/{name}" for name in names)
    for prefix in ("order/a", "order/a/", "order/a/1", "order/a/1/", "order/b", "order/c/"):
        assert listed(objects, prefix) == sorted(f"order/{n}" for n in names if f"order/{n}".startswith(prefix))


WRITER = """
import sys
from pathlib import Path
from pipeline.errors import StoreConflict
from pipeline.objects_local import LocalObjects

objects, name = LocalObjects(Path(sys.argv[1])), sys.argv[2]
"""


def process(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER + code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


RACE = """
print("ready", flush=True)
etags = sys.stdin.readline().split()
for number, etag in enumerate(etags):
    for write in (
        lambda: objects.create(f"created/{number}", name.encode()),
        lambda: objects.replace(f"replaced/{number}", name.encode(), etag),
    ):
        try:
            write()
        except StoreConflict:
            print("lost")
        else:
            print("won")
"""


def test_of_many_processes_one_wins(tmp_path):
    """Of 8 processes that write 40 objects at once, one wins each, and its bytes are there."""
    objects = LocalObjects(tmp_path)
    etags = [objects.create(f"replaced/{number}", b"first") for number in range(20)]
    racers = [process(RACE, tmp_path, number) for number in range(8)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write(" ".join(etags) + "\n")
        racer.stdin.flush()
    outcomes = [racer.communicate()[0].split() for racer in racers]
    for number, outcome in enumerate(zip(*outcomes, strict=True)):
        assert outcome.count("won") == 1
        kept = objects.get(f"{('created', 'replaced')[number % 2]}/{number // 2}")
        assert kept.data == str(outcome.index("won")).encode()
    assert len(outcomes[0]) == 40


ENDLESS = """
etag = objects.get(name).etag
for number in range(1, 10**9):
    etag = objects.replace(name, number.to_bytes(4, "big") * 500_000, etag)
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path, key):
    """After kill -9 an object is whole: what its writer was last told to have written, or the next; all goes on."""
    objects = LocalObjects(tmp_path)
    objects.create(key, bytes(2_000_000))
    for told in range(1, 7):
        with process(ENDLESS, tmp_path, key) as writer:
            lines = [writer.stdout.readline() for _ in range(told)]
            writer.kill()
            last = int([*lines, *writer.stdout][-1])
        found = objects.get(key)
        number = int.from_bytes(found.data[:4], "big")
        assert found.data == number.to_bytes(4, "big") * 500_000
        assert number in (last, last + 1)
        objects.replace(key, bytes(2_000_000), found.etag)  # its lock is gone with it
    assert listed(objects, "") == [key]


def test_what_killed_writers_left_is_harmless(tmp_path, key):
    """A half-written file is never listed, is in nobody's way, and is gone after a write or a check."""
    objects = LocalObjects(tmp_path)
    objects.check()
    left = [tmp_path / ".writing" / f"{shard:02x}.new" for shard in range(256)]
    for path in left:
        path.write_bytes(b"half of a photo, longer than what comes next")
    objects.create(key, b"new")
    assert objects.get(key).data == b"new"
    assert sum(path.exists() for path in left) == 255
    assert listed(objects, "") == [key]
    objects.check()
    assert not any(path.exists() for path in left)


def test_other_folders_are_not_looked_into(tmp_path):
    """A listing opens only folders in which there may be an object of its prefix."""
    objects = LocalObjects(tmp_path)
    for key in ("jobs/a/1", "jobs/b/1"):
        objects.create(key, b"")
    (tmp_path / "jobs" / "a" / "loop").symlink_to("loop")  # who looks into this folder fails
    assert listed(objects, "jobs/b") == listed(objects, "jobs/b/") == ["jobs/b/1"]
    with pytest.raises(StoreMisconfigured, match="PULID_STORE__URL"):
        listed(objects, "jobs/")


def test_folders_come_and_go(tmp_path):
    """Threads that write and delete in one folder never meet it missing, and no empty folder is left."""
    objects = LocalObjects(tmp_path)

    def work(number):
        for _ in range(100):
            objects.create(f"a/b/c/{number}", b"")
            objects.delete(f"a/b/c/{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert [path.name for path in tmp_path.iterdir()] == [".writing"]


def test_a_listing_of_a_folder_reads_no_object(tmp_path, key):
    """What is listed costs nothing of its size."""
    objects = LocalObjects(tmp_path)
    objects.create(key, b"one")
    os.truncate(tmp_path / key, 1 << 40)  # a hole of a terabyte, which no memory holds
    assert listed(objects, key) == [key]


def test_no_version_of_a_file_comes_back(tmp_path, key):
    """However fast an object is written over or made anew, also by bytes that it had before, its version is new."""
    objects = LocalObjects(tmp_path)
    versions = [objects.create(key, b"two")]
    for _ in range(50):
        versions.append(objects.replace(key, b"one", versions[-1]))
        versions.append(objects.replace(key, b"two", versions[-1]))
        objects.delete(key)
        versions.append(objects.create(key, b"two"))
    assert len(set(versions)) == len(versions)


def test_a_version_is_new_though_clocks_are_not(tmp_path, key):
    """Over a file that bears a later time than it is now, the next one bears one that is later still."""
    objects = LocalObjects(tmp_path)
    objects.create(key, b"one")
    os.utime(tmp_path / key, (4e9, 4e9))
    objects.replace(key, b"two", objects.get(key).etag)
    assert (tmp_path / key).stat().st_mtime_ns > 4_000_000_000_000_000_000


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_what_lies_in_a_folder_is_private(tmp_path, mask):
    """Files are 0600 and folders 0700 by whatever umask; a folder that was there before stays as it was."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o755)
    before = os.umask(mask)
    try:
        LocalObjects(tmp_path / "theirs" / "a" / "pictures").create("files/b/c.photo", b"a face")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "theirs").rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert stat.S_IMODE((tmp_path / "theirs").stat().st_mode) == 0o755


def test_a_lost_answer_is_no_conflict(s3_endpoint, key):
    """The write arrived, its answer did not, and the retry meets it: it is our own."""
    with behind(s3_endpoint, s3.loses_the_answer) as (objects, _):
        etag = objects.create(key, b"one")
    with behind(s3_endpoint, s3.loses_the_answer) as (objects, proxy):
        assert objects.replace(key, b"two", etag) == objects.get(key).etag
        assert [method for method, _ in proxy.calls] == ["PUT", "PUT", "GET", "GET"]


def test_when_every_answer_is_lost_the_same_call_finds_its_write(s3_endpoint, key):
    """After all tries the write is unavailable; made again by its caller, it is found to be there."""
    with behind(s3_endpoint, s3.loses_the_answer, s3.loses_the_answer) as (objects, _):
        with pytest.raises(StoreUnavailable):
            objects.create(key, b"one")
        etag = objects.create(key, b"one")
    with behind(s3_endpoint, s3.loses_the_answer, s3.loses_the_answer) as (objects, _):
        with pytest.raises(StoreUnavailable):
            objects.replace(key, b"two", etag)
        assert objects.replace(key, b"two", etag) == objects.get(key).etag


@pytest.mark.parametrize("what", ["create", "replace"])
def test_a_lost_answer_hides_no_other_writer(s3_endpoint, key, what):
    """A try that did not arrive, and another writer before the next: that is a conflict, and the other's bytes stay."""
    other = S3Objects(s3_settings(s3_endpoint))
    etag = other.create(key, b"first") if what == "replace" else None

    def another_was_first(_):
        other.create(key, b"other") if etag is None else other.replace(key, b"other", etag)

    with behind(s3_endpoint, another_was_first) as (objects, _), pytest.raises(StoreConflict):
        objects.create(key, b"mine") if etag is None else objects.replace(key, b"mine", etag)
    assert other.get(key).data == b"other"


@pytest.mark.parametrize("times", [1, 2])
def test_an_undecided_replacement_is_tried_again(s3_endpoint, key, times):
    """409 on a conditional write: once is not seen, more than the attempts is `unavailable`, and nothing is written."""
    with behind(s3_endpoint, s3.passes, *[refuses(409, "ConditionalRequestConflict")] * times) as (objects, _):
        etag = objects.create(key, b"one")
        if times == 1:
            assert objects.replace(key, b"two", etag) == objects.get(key).etag
        else:
            with pytest.raises(StoreUnavailable):
                objects.replace(key, b"two", etag)
            assert objects.get(key).data == b"one"


def refuses_to_replace(call):
    """A server that takes every If-Match for a mismatch."""
    if "If-Match" in call.headers:
        refuses(412, "PreconditionFailed")(call)
    else:
        s3.passes(call)


LACKING = {
    "knows no If-None-Match": s3.without("If-None-Match"),
    "knows no If-Match": s3.without("If-Match"),
    "knows neither": s3.without("If-None-Match", "If-Match"),
    "never replaces": refuses_to_replace,
    "says that it has none": lambda call: (refuses(501, "NotImplemented") if call.method == "PUT" else s3.passes)(call),
}


@pytest.mark.parametrize("lacks", LACKING)
def test_a_server_without_conditional_writes_is_refused(s3_endpoint, lacks):
    """The check at start refuses a server that does not decide between writers, and leaves nothing behind."""
    with behind(s3_endpoint, otherwise=LACKING[lacks]) as (objects, _):
        with pytest.raises(StoreMisconfigured, match="lacks conditional writes"):
            objects.check()
        assert listed(objects, "check/") == []


def test_long_lists_come_in_pages(s3_endpoint, monkeypatch):
    """A listing goes on where S3 breaks it off, in order, each entry with the version to replace."""
    with behind(s3_endpoint) as (objects, proxy):
        written = {f"pages/{number:02}": objects.create(f"pages/{number:02}", b"%d" % number) for number in range(10)}
        monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")  # a page of AWS has a thousand
        del proxy.calls[:]
        assert [(entry.key, entry.etag) for entry in objects.list("pages/")] == list(written.items())
        assert len(proxy.calls) == 4
        del proxy.calls[:]
        assert next(iter(objects.list("pages/"))).key == "pages/00"
        assert len(proxy.calls) == 1


@pytest.mark.parametrize(
    ("changes", "sent"),
    [
        ({}, (None, None)),
        ({"encryption": "AES256", "kms_key": "not used"}, ("AES256", None)),
        ({"encryption": "aws:kms"}, ("aws:kms", None)),
        ({"encryption": "aws:kms", "kms_key": "alias/mine"}, ("aws:kms", "alias/mine")),
    ],
)
def test_every_write_asks_for_encryption(s3_endpoint, key, changes, sent):
    """Creating and replacing ask S3 to encrypt as the settings say, and for nothing where they say nothing."""
    seen = []

    def notes(call):
        headers = {name.lower(): value for name, value in call.headers.items()}
        if call.method == "PUT":
            name = "x-amz-server-side-encryption"
            seen.append((headers.get(name), headers.get(f"{name}-aws-kms-key-id")))
        s3.passes(call)

    with behind(s3_endpoint, otherwise=notes, **changes) as (objects, _):
        objects.replace(key, b"two", objects.create(key, b"one"))
    assert seen == [sent, sent]


def test_a_key_that_kms_cannot_use_is_told(s3_endpoint, key):
    """An error of KMS is the operator's, with the setting's name."""
    disabled = refuses(400, "KMS.DisabledException")
    with behind(s3_endpoint, disabled) as (objects, _), pytest.raises(StoreMisconfigured, match="PULID_STORE__KMS_KEY"):
        objects.create(key, b"one")


def test_who_writes_next_is_not_taken_for_damage(s3_endpoint, key):
    """Where S3 tells no checksum it is asked; an answer about the next writer's object is none about ours."""
    other = S3Objects(s3_settings(s3_endpoint))

    def overwritten_at_once(call):
        status, headers, body = call.upstream()
        other.replace(key, b"another, and longer", headers["ETag"])
        call.answer(status, {name: value for name, value in headers.items() if "sha256" not in name}, body)

    def deleted_at_once(call):
        status, headers, body = call.upstream()
        other.delete(key)
        call.answer(status, {name: value for name, value in headers.items() if "sha256" not in name}, body)

    for fault in (overwritten_at_once, deleted_at_once):
        other.delete(key)
        with behind(s3_endpoint, fault) as (objects, proxy):
            objects.create(key, b"one")
            assert [method for method, _ in proxy.calls] == ["PUT", "HEAD"]


def test_a_damaged_object_is_not_handed_out(s3_endpoint, key):
    """Bytes that do not fit the checksum which S3 keeps are `corrupt`."""
    with behind(s3_endpoint, s3.passes, s3.damages_the_answer) as (objects, _):
        objects.create(key, b"one")
        with pytest.raises(StoreCorrupt):
            objects.get(key)
