"""The picture store: a folder, and S3 over HTTP in good and bad days."""

import hashlib
import json
import logging
import resource
import socket
import traceback
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from pipeline.errors import ImageNotFound, StoreConflict, StoreCorrupt, StoreMisconfigured, StoreUnavailable
from pipeline.faces import FaceBox
from pipeline.picture import Picture
from pipeline.request import Request
from pipeline.settings import StoreSettings
from pipeline.store import open_objects, open_store
from pipeline.trace import Trace
from tests import s3
from tests.s3 import CREDENTIALS, failing, refuses, s3_settings

UNKNOWN = "f" * 32
IDS = (f"{number:032x}" for number in count(1))
NOT_IDS = ["", "x" * 32, "A" * 32, "1" * 31, "1" * 33, "1" * 32 + "\n", "../" * 10 + "ab", "/etc/passwd", "１" * 32]
PROMPT = "portrait, a very private wish"


def request(**changes) -> Request:
    people = [
        {"photos": ["cGhvdG8="], "mask": {"base64": "bWFzaw=="}},
        {"photos": ["YQ=="], "mask": {"box": [0, 0, 1, 1]}},
    ]
    return Request(prompt=PROMPT, people=people, seed=7, num_outputs=2, num_steps=4, **changes)


def picture(seed: int, data: bytes = b"") -> Picture:
    return Picture(
        data=data or b"\x89PNG" + bytes([seed]) * 1000,
        media_type="image/png",
        width=896,
        height=1152,
        seed=seed,
        steps=4,
        prompt_truncated=False,
        faces=((FaceBox(0, (1.0, 2.0, 3.0, 4.0), 0.75),), (FaceBox(0, (5.0, 6.0, 7.0, 8.0), 0.5),)),
        trace=Trace({"faces": 0.25, "identity": 0.5, "text": 0.125, "denoise": 2.0}, {"flux.safetensors": "ab" * 32}),
    )


PICTURES = (picture(7), picture(8))


def folder(path: Path):
    return open_store(StoreSettings(url=f"file://{path}"))


@pytest.fixture(params=["folder", "s3"], scope="module")
def store(request, tmp_path_factory, s3_endpoint):
    if request.param == "folder":
        return folder(tmp_path_factory.mktemp("pictures"))
    return open_store(s3_settings(s3_endpoint))


@pytest.fixture
def image_id():
    return next(IDS)


def use(store, way: str) -> None:
    """One way into a store: save an image that was never saved before, read one, or check."""
    if way == "save":
        store.save(UNKNOWN, request(), PICTURES)
    elif way == "record":
        store.record(UNKNOWN)
    elif way == "content":
        store.content(UNKNOWN, 0)
    else:
        store.check()


def bytes_of(content) -> bytes:
    return content.data if content.link is None else httpx.get(content.link).raise_for_status().content


def test_what_was_saved_is_what_is_read(store, image_id):
    """Every picture and the record come back as they were saved."""
    store.check()
    stored = store.save(image_id, request(), PICTURES)
    assert stored.id == image_id
    assert len(stored.urls) == 2
    assert store.record(image_id) == stored.record
    for number, saved in enumerate(PICTURES):
        content = store.content(image_id, number)
        assert content.media_type == "image/png"
        assert bytes_of(content) == store.data(image_id, number) == saved.data


def test_the_record_tells_how_to_make_the_image_again(store, image_id):
    """The record holds the whole request but photos and masks, seeds, faces, models and timings."""
    record = store.save(image_id, request(true_cfg=2.0), PICTURES).record
    assert record["id"] == image_id
    assert record["tenant"] == ""
    assert record["attempt"] is None
    assert record["request"]["prompt"] == PROMPT
    assert record["request"]["true_cfg"] == 2.0
    first, second = record["request"]["people"]
    assert "photos" not in first
    assert first["mask"] == {"base64_sha256": hashlib.sha256(b"bWFzaw==").hexdigest()}
    assert second["mask"] == {"box": [0, 0, 1, 1]}
    assert "cGhvdG8=" not in json.dumps(record)
    assert record["seeds"] == [7, 8]
    assert record["pictures"][1] == {
        "file": "1.png",
        "media_type": "image/png",
        "width": 896,
        "height": 1152,
        "seed": 8,
        "steps": 4,
        "sha256": hashlib.sha256(PICTURES[1].data).hexdigest(),
        "bytes": 1004,
    }
    assert record["faces"][1] == [{"photo": 0, "box": [5.0, 6.0, 7.0, 8.0], "score": 0.5}]
    assert record["models"] == {"flux.safetensors": "ab" * 32}
    timings = dict(record["timings"])
    assert timings.pop("store") > 0
    # two pictures, one face; none of them waited
    assert timings == {"faces": 0.25, "identity": 0.5, "text": 0.125, "queue": 0.0, "denoise": 4.0}


def test_an_image_is_written_once(store, image_id):
    """A second image under the same id is refused, whatever is different in it, and the first one stays."""
    store.save(image_id, request(), PICTURES)
    for other in (PICTURES, (PICTURES[0], picture(9))):
        with pytest.raises(StoreConflict):
            store.save(image_id, request(guidance_scale=2.0), other)
    assert store.record(image_id)["request"]["guidance_scale"] == 4.0
    assert bytes_of(store.content(image_id, 1)) == PICTURES[1].data


@pytest.mark.parametrize("image_id", [*NOT_IDS, UNKNOWN])
def test_ids_that_are_none_find_nothing(store, image_id):
    """What is not 32 hexadecimal digits, or was never saved, is not found, and is not repeated in the message."""
    for read in (lambda: store.record(image_id), lambda: store.content(image_id, 0)):
        with pytest.raises(ImageNotFound) as caught:
            read()
        assert not image_id or image_id not in str(caught.value)


@pytest.mark.parametrize("number", [-1, 2, 10**9])
def test_pictures_that_were_not_made_are_not_found(store, number, image_id):
    """A picture's number counts from 0 to the last picture."""
    store.save(image_id, request(), PICTURES)
    with pytest.raises(ImageNotFound):
        store.content(image_id, number)


def test_threads_share_a_store(store):
    """Images saved at once from several threads are all there and whole."""
    ids = [next(IDS) for _ in range(4)]
    made = {image_id: (picture(number + 1), picture(number + 100)) for number, image_id in enumerate(ids)}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda image_id: store.save(image_id, request(), made[image_id]), ids))
    for image_id in ids:
        assert [bytes_of(store.content(image_id, number)) for number in (0, 1)] == [p.data for p in made[image_id]]


def test_of_two_savers_of_one_id_one_wins(tmp_path, image_id):
    """When two threads save under one id at once, exactly one succeeds, and its record stays."""
    store = folder(tmp_path)

    def save(scale):
        try:
            return store.save(image_id, request(guidance_scale=scale), PICTURES).record
        except StoreConflict:
            return None

    with ThreadPoolExecutor(2) as pool:
        records = [record for record in pool.map(save, [2.0, 3.0]) if record is not None]
    assert [store.record(image_id)] == records


def test_another_saver_may_win_until_the_last_moment(s3_endpoint, image_id):
    """A record that appears in S3 between our pictures and our record is not overwritten."""

    other = open_store(s3_settings(s3_endpoint))

    def another_was_first(call):
        other.save(image_id, request(guidance_scale=2.0), PICTURES)
        s3.passes(call)

    with failing(s3_endpoint, s3.passes, s3.passes, another_was_first) as proxy, pytest.raises(StoreConflict):
        open_store(s3_settings(proxy.endpoint)).save(image_id, request(), PICTURES)
    assert other.record(image_id)["request"]["guidance_scale"] == 2.0


def tree(root: Path) -> list[str]:
    """Files and folders below `root`, but for the locks."""
    paths = [path.relative_to(root) for path in root.rglob("*") if path.suffix != ".lock"]
    return sorted(str(path) for path in paths if path != Path(".writing"))


def test_a_folder_holds_what_the_layout_says(tmp_path, image_id):
    """images/{id}/0.png and record.json, nothing else but locks; the addresses are those of the files."""
    store = folder(tmp_path)
    store.check()
    stored = store.save(image_id, request(), PICTURES)
    names = ("", "/0.png", "/1.png", "/record.json")
    assert tree(tmp_path) == ["images", *(f"images/{image_id}{name}" for name in names)]
    assert [path.read_bytes() for path in stored.paths] == [saved.data for saved in PICTURES]
    assert all(url.startswith("file:///") for url in stored.urls)


def test_a_failing_picture_leaves_nothing_behind(tmp_path, image_id):
    """When a picture cannot be written, there is no record, no other picture and no temporary file."""
    store = folder(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = picture(8, bytes(200_000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the second picture meets the end of the disk
    try:
        with pytest.raises(StoreUnavailable, match="no room"):
            store.save(image_id, request(), (PICTURES[0], large))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(tmp_path) == []
    with pytest.raises(ImageNotFound):
        store.record(image_id)


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path):
    """A file where the folder should be is the operator's error, with the setting's name, on every way in."""
    (tmp_path / "file").write_text("in the way")
    store = folder(tmp_path / "file")
    for way in ("check", "save", "record"):
        with pytest.raises(StoreMisconfigured, match="PULID_STORE__URL"):
            use(store, way)


@pytest.mark.parametrize("damage", [b"", b"\x89PNG other", None])
def test_a_damaged_picture_is_never_handed_out(tmp_path, damage, image_id):
    """A picture in a folder that was altered or removed is found out."""
    store = folder(tmp_path)
    path = store.save(image_id, request(), PICTURES).paths[1]
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    with pytest.raises(StoreCorrupt):
        store.content(image_id, 1)
    assert store.content(image_id, 0).data == PICTURES[0].data


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"id": "other"}'])
def test_a_damaged_record_is_found_out(tmp_path, damage, image_id):
    """Bytes that are not the record of this image are no record."""
    store = folder(tmp_path)
    store.save(image_id, request(), PICTURES)
    (tmp_path / "images" / image_id / "record.json").write_bytes(damage)
    with pytest.raises(StoreCorrupt):
        store.content(image_id, 0)


def test_keys_hold_the_prefix_and_the_id_only(s3_endpoint, image_id):
    """In S3 the keys follow the layout below the prefix, pictures are sent before the record, and no text leaks."""
    with failing(s3_endpoint) as proxy:
        open_store(s3_settings(proxy.endpoint, url=f"s3://{s3.BUCKET}/a/b/")).save(image_id, request(), PICTURES)
    base = f"/{s3.BUCKET}/a/b/images/{image_id}"
    assert proxy.calls == [("PUT", f"{base}/{name}") for name in ("0.png", "1.png", "record.json")]


def test_a_link_downloads_and_names_its_end(s3_endpoint, image_id):
    """A presigned link gives the bytes with a fixed type as an attachment; it is signed for its lifetime."""
    store = open_store(s3_settings(s3_endpoint, link_seconds=77))
    stored = store.save(image_id, request(), PICTURES)
    answer = httpx.get(stored.urls[1])
    assert answer.content == PICTURES[1].data
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == f'attachment; filename="{image_id}-1.png"'
    query = parse_qs(urlsplit(store.content(image_id, 1).link).query)
    assert query["X-Amz-Expires"] == ["77"]
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert query["X-Amz-Signature"]
    assert stored.paths == ()


@pytest.mark.parametrize(
    ("path_style", "host", "start"), [(True, "localhost", "/pictures/"), (False, "pictures.localhost", "/some/")]
)
def test_path_style_puts_the_bucket_into_the_path(s3_endpoint, path_style, host, start, image_id):
    """With path_style the bucket is in the path; else boto3 puts it into the host's name where it can."""
    endpoint = s3_endpoint.replace("127.0.0.1", "localhost")
    objects = open_objects(s3_settings(endpoint, path_style=path_style))
    link = urlsplit(objects.link(f"images/{image_id}/0.png", "image/png", "0.png"))
    assert link.hostname == host
    assert link.path.startswith(start)
    if path_style:
        objects.check()


REFUSALS = {
    "ExpiredToken": (400, "expired"),
    "TokenRefreshRequired": (400, "expired"),
    "InvalidAccessKeyId": (403, "credentials"),
    "SignatureDoesNotMatch": (403, "credentials"),
    "AccessDenied": (403, "s3:ListBucket"),
    "RequestTimeTooSkewed": (403, "clock"),
    "AuthorizationHeaderMalformed": (400, "PULID_STORE__REGION"),
    "NotImplemented": (501, "If-None-Match"),
    "InvalidStorageClass": (400, "InvalidStorageClass"),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_every_refusal_says_what_to_do(s3_endpoint, code, caplog):
    """What S3 refuses is the operator's error, in a sentence without keys; nothing is logged with them either."""
    status, words = REFUSALS[code]
    caplog.set_level(logging.INFO)
    with failing(s3_endpoint, *[refuses(status, code)] * 3) as proxy:
        store = open_store(s3_settings(proxy.endpoint))
        for way in ("check", "save", "record"):
            with pytest.raises(StoreMisconfigured, match=words) as caught:
                use(store, way)
            seen = "".join(traceback.format_exception(caught.value)) + caplog.text
            assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in seen
            assert CREDENTIALS["AWS_ACCESS_KEY_ID"] not in seen
            assert PROMPT not in seen
        with pytest.raises(ImageNotFound):  # the save wrote no record
            store.record(UNKNOWN)


def test_unknown_credentials_and_missing_rights(s3_endpoint, monkeypatch):
    """A server that looks at credentials refuses unknown ones, and known ones without rights, at the check."""
    with s3.access_checked(s3_endpoint), pytest.raises(StoreMisconfigured, match="does not accept the credentials"):
        open_store(s3_settings(s3_endpoint)).check()
    for name, value in s3.user_without_rights(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    with s3.access_checked(s3_endpoint), pytest.raises(StoreMisconfigured, match="denies access to bucket pictures"):
        open_store(s3_settings(s3_endpoint)).check()


def test_no_credentials_at_all(s3_endpoint, monkeypatch):
    """Without credentials the message names the variables to set."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = open_store(s3_settings(s3_endpoint))
    for way in ("check", "save", "content"):
        with pytest.raises(StoreMisconfigured, match="AWS_ACCESS_KEY_ID"):
            use(store, way)


@pytest.mark.parametrize("way", ["check", "save", "record"])
def test_a_missing_bucket_is_named(s3_endpoint, way):
    """A bucket that does not exist is the operator's error, never `image not found`."""
    store = open_store(s3_settings(s3_endpoint, url="s3://no-such-bucket/x"))
    with pytest.raises(StoreMisconfigured, match="no bucket no-such-bucket"):
        use(store, way)


@pytest.mark.parametrize(
    "changes",
    [{"endpoint_url": "nowhere"}, {"url": "s3:///prefix"}, {"url": "s3://Not_A_Bucket!/x"}, {"region": "not a region"}],
)
def test_impossible_settings_are_refused(s3_endpoint, changes):
    """An address, bucket or region that cannot be is told as such."""
    with pytest.raises(StoreMisconfigured):
        open_store(s3_settings(s3_endpoint, **changes)).check()


def test_a_server_that_is_down():
    """A refused connection is `unavailable`, after the set number of attempts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        store = open_store(s3_settings(f"http://127.0.0.1:{taken.getsockname()[1]}"))
        for way in ("check", "save", "content"):
            with pytest.raises(StoreUnavailable):
                use(store, way)


def test_a_server_that_does_not_answer(s3_endpoint, image_id):
    """A server that takes a call and says nothing is given up after read_seconds, each attempt anew."""
    with failing(s3_endpoint, s3.stalls, s3.stalls) as proxy:
        with pytest.raises(StoreUnavailable):
            open_store(s3_settings(proxy.endpoint, read_seconds=0.1)).record(image_id)
        assert len(proxy.calls) == 2


@pytest.mark.parametrize("fault", [s3.slow_down, refuses(500, "InternalError"), s3.loses_the_answer])
def test_a_passing_failure_is_retried(s3_endpoint, fault, image_id):
    """One 503, 500 or broken connection is not seen by the caller."""
    with failing(s3_endpoint, fault) as proxy:
        store = open_store(s3_settings(proxy.endpoint))
        store.save(image_id, request(), PICTURES)
        assert proxy.calls[0] == proxy.calls[1]
        assert bytes_of(store.content(image_id, 0)) == PICTURES[0].data


def test_a_lasting_failure_is_told(s3_endpoint, image_id):
    """A server that keeps asking to slow down is `unavailable`, after the set number of attempts."""
    with failing(s3_endpoint, s3.slow_down, s3.slow_down) as proxy:
        with pytest.raises(StoreUnavailable):
            open_store(s3_settings(proxy.endpoint)).record(image_id)
        assert len(proxy.calls) == 2


def test_a_record_whose_answer_is_lost_is_not_a_conflict(s3_endpoint, image_id):
    """The record arrived, its answer did not, and the retry meets it: that is our own record, not another's."""
    with failing(s3_endpoint, s3.passes, s3.passes, s3.loses_the_answer) as proxy:
        store = open_store(s3_settings(proxy.endpoint))
        stored = store.save(image_id, request(), PICTURES)
        assert store.record(image_id) == stored.record


@pytest.mark.parametrize("times", [1, 2])
def test_an_undecided_write_is_tried_again(s3_endpoint, times, image_id):
    """409 on a conditional write means try again: once is not seen, more than the attempts is `unavailable`."""
    undecided = [refuses(409, "ConditionalRequestConflict")] * times
    with failing(s3_endpoint, s3.passes, s3.passes, *undecided) as proxy:
        store = open_store(s3_settings(proxy.endpoint))
        if times == 1:
            store.save(image_id, request(), PICTURES)
        else:
            with pytest.raises(StoreUnavailable):
                store.save(image_id, request(), PICTURES)


@pytest.mark.parametrize("fault", [s3.stores_other_bytes, refuses(400, "BadDigest")])
def test_a_wrong_checksum_of_a_picture_leaves_no_record(s3_endpoint, fault, image_id):
    """When S3 does not hold what was sent, nothing is recorded."""
    with failing(s3_endpoint, s3.passes, fault) as proxy:
        store = open_store(s3_settings(proxy.endpoint))
        with pytest.raises(StoreCorrupt):
            store.save(image_id, request(), PICTURES)
        with pytest.raises(ImageNotFound):
            store.record(image_id)


@pytest.mark.parametrize(
    ("fault", "error"), [(s3.cuts_the_answer, StoreUnavailable), (s3.damages_the_answer, StoreCorrupt)]
)
def test_a_damaged_answer_is_found_out(s3_endpoint, fault, error, image_id):
    """A record that arrives cut off or altered is not believed."""
    with failing(s3_endpoint, s3.passes, s3.passes, s3.passes, fault) as proxy:
        store = open_store(s3_settings(proxy.endpoint))
        store.save(image_id, request(), PICTURES)
        with pytest.raises(error):
            store.record(image_id)
        assert store.record(image_id)["id"] == image_id


@pytest.mark.parametrize("hides", ["put", "put and head"])
def test_a_server_without_checksums_is_measured(s3_endpoint, hides, image_id):
    """Where S3 does not tell checksums, it is asked for them, and the length counts at the least."""

    def without_checksum(call):
        status, headers, body = call.upstream()
        call.answer(status, {k: v for k, v in headers.items() if k.lower() != "x-amz-checksum-sha256"}, body)

    def shorter(call):
        status, headers, body = call.upstream()
        call.answer(
            status,
            {k: "3" if k.lower() == "content-length" else v for k, v in headers.items() if "sha256" not in k},
            body,
        )

    faults = {"put": (without_checksum, s3.passes), "put and head": (without_checksum, shorter)}[hides]
    with failing(s3_endpoint, *faults) as proxy:
        store = open_store(s3_settings(proxy.endpoint))
        if hides == "put":
            store.save(image_id, request(), PICTURES)
            assert [method for method, _ in proxy.calls] == ["PUT", "HEAD", "PUT", "PUT"]
        else:
            with pytest.raises(StoreCorrupt):
                store.save(image_id, request(), PICTURES)


def names(store, image_id: str) -> list[str]:
    """What is kept of an image."""
    return [entry.key.rpartition("/")[2] for entry in store._objects.list(f"images/{image_id}/")]


def test_attempts_write_side_by_side_and_one_is_committed(store, image_id):
    """Attempts publish without meeting; the one that is committed is the image, and pruning leaves it alone."""
    for attempt, scale in ((1, 2.0), (2, 3.0)):
        made = (picture(attempt), picture(attempt + 10))
        draft = store.publish(image_id, request(guidance_scale=scale), made, "acme", attempt)
        assert store.draft(image_id, attempt) == draft
        with pytest.raises(ImageNotFound):
            store.record(image_id)
    stored = store.commit(image_id, draft)
    assert len(stored.urls) == 2
    store.prune(image_id)
    assert names(store, image_id) == ["2-0.png", "2-1.png", "record.json"]
    assert store.draft(image_id, 2) is None
    assert store.record(image_id) == draft
    assert bytes_of(store.content(image_id, 1)) == picture(12).data


def test_publishing_and_committing_may_be_repeated(store, image_id):
    """Again the same, each does nothing; other pictures of one attempt, or another record, are refused."""
    draft = store.publish(image_id, request(), PICTURES, "acme", 1)
    assert store.publish(image_id, request(), PICTURES, "acme", 1) == draft
    for other in ((PICTURES[0], picture(9)), PICTURES[:1]):
        with pytest.raises(StoreConflict):
            store.publish(image_id, request(), other, "acme", 1)
    store.commit(image_id, draft)
    store.commit(image_id, draft)
    with pytest.raises(StoreConflict):
        store.commit(image_id, {**draft, "attempt": 2})
    assert store.record(image_id) == draft


def test_a_record_without_pictures_leaves_none(store, image_id):
    """What was published of a job that failed is gone after its record is there and was pruned."""
    draft = store.publish(image_id, request(), PICTURES, "acme", 1)
    assert store.commit(image_id, {**draft, "pictures": []}).urls == ()
    store.prune(image_id)
    assert names(store, image_id) == ["record.json"]
    with pytest.raises(ImageNotFound):
        store.content(image_id, 0)


def test_only_what_was_never_published_is_discarded(store, image_id):
    """Discarding takes the pictures of an attempt without a draft, and never those of one that was committed."""
    draft = store.publish(image_id, request(), PICTURES, "acme", 1)
    store.publish(image_id, request(), PICTURES, "acme", 11)
    store._objects.delete(f"images/{image_id}/11.json")
    for attempt in (1, 11):
        store.discard(image_id, attempt)
    assert names(store, image_id) == ["1-0.png", "1-1.png", "1.json"]
    store.commit(image_id, draft)
    store.prune(image_id)
    store.discard(image_id, 1)
    assert names(store, image_id) == ["1-0.png", "1-1.png", "record.json"]


def test_erasing_leaves_nothing_and_takes_nothing_else(store):
    """An erased image is not found, nothing of it is kept, and other images stay; doing it again does no harm."""
    mine, other = next(IDS), next(IDS)
    for image_id in (mine, other):
        store.save(image_id, request(), PICTURES)
    store.publish(mine, request(), PICTURES, "", 1)
    for _ in range(2):
        store.erase(mine)
        assert names(store, mine) == []
    with pytest.raises(ImageNotFound):
        store.record(mine)
    assert names(store, other) == ["0.png", "1.png", "record.json"]


def test_an_erasing_that_breaks_off_can_be_done_again(s3_endpoint, image_id):
    """The record goes last: while anything of an image is left, it is found by whoever erases again."""
    store = open_store(s3_settings(s3_endpoint))
    store.save(image_id, request(), PICTURES)
    faults = (s3.passes, s3.passes, s3.slow_down, s3.slow_down)
    with failing(s3_endpoint, *faults) as proxy, pytest.raises(StoreUnavailable):
        open_store(s3_settings(proxy.endpoint)).erase(image_id)
    assert names(store, image_id) == ["1.png", "record.json"]
    store.erase(store.record(image_id)["id"])
    assert names(store, image_id) == []


def test_another_tenants_image_is_not_there(store, image_id):
    """With a tenant only the tenant's own images are found; without one, all are."""
    store.save(image_id, request(), PICTURES, "acme")
    assert store.record(image_id, "acme") == store.record(image_id)
    assert bytes_of(store.content(image_id, 0, "acme")) == PICTURES[0].data
    for tenant in ("", "other"):
        with pytest.raises(ImageNotFound):
            store.record(image_id, tenant)
        with pytest.raises(ImageNotFound):
            store.content(image_id, 0, tenant)
        with pytest.raises(ImageNotFound):
            store.data(image_id, 0, tenant)


def rewrite(path: Path, **changes) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**record, **changes}.items() if value != "gone"}))


def test_records_from_before_there_were_tenants_are_read(tmp_path, image_id):
    """A record without tenant and attempt belongs to nobody in particular."""
    store = folder(tmp_path)
    store.save(image_id, request(), PICTURES)
    rewrite(tmp_path / "images" / image_id / "record.json", tenant="gone", attempt="gone")
    assert store.record(image_id, "")["attempt"] is None
    assert store.content(image_id, 0).data == PICTURES[0].data
    with pytest.raises(ImageNotFound):
        store.record(image_id, "acme")


@pytest.mark.parametrize("file", ["../../secret.png", "/etc/passwd", "1.png", "0.jpg", "0.png\n", "record.json", ""])
def test_a_record_names_pictures_only(tmp_path, file, image_id):
    """A file that cannot be the picture is never read, whatever the record says."""
    store = folder(tmp_path)
    pictures = store.save(image_id, request(), PICTURES).record["pictures"]
    rewrite(tmp_path / "images" / image_id / "record.json", pictures=[{**pictures[0], "file": file}])
    with pytest.raises(StoreCorrupt):
        store.content(image_id, 0)
