import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

from deployments.stages import FaceDetector as FacesReplica
from deployments.stages import IdentityEncoder as IdentityReplica
from pipeline.caches import ENTRY_BYTES, Cache, digest
from pipeline.errors import Cancelled, FaceIndexOutOfRange, InternalError, NoFace, PhotoUnreadable
from pipeline.face_models import FaceModels
from pipeline.faces import FaceDetector
from pipeline.identity import IdentityEncoder
from pipeline.request import Person, Photo
from pipeline.settings import CacheSettings, Settings
from pipeline.text import TextEncoder
from tests import small
from tests.test_faces import LEFT, PHOTO, RIGHT, Found, Halves, Means

ROOM = 2000  # of one value of these tests, and a little
CALLS = 16
LIFETIME = 3600.0


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0

    def __call__(self):
        return self.now


def cache(entries, seconds=60.0, tenant_entries=None, clock=None):
    """A cache with room for so many values of 900 bytes."""
    most = None if tenant_entries is None else tenant_entries * ROOM
    return Cache(entries * ROOM, lambda value: 900, seconds, most, clock or Clock())


def ask(kept, name, tenant=""):
    """Whether the cache had to compute."""
    computed = []
    kept.get_or_compute((tenant, name.encode()), lambda: computed.append(name))
    return bool(computed)


# --- the cache


def test_a_hit_computes_nothing():
    """A key's value is computed once, even where it is None, and given from then on; hits and misses are counted."""
    kept = cache(4)
    assert [ask(kept, name) for name in "abaab"] == [True, True, False, False, False]
    stats = kept.stats()
    assert (stats.hits, stats.misses, stats.evictions, stats.entries) == (3, 2, 0, 2)


def test_the_least_recently_used_makes_room():
    """The bytes never exceed the capacity, and what was used last stays."""
    kept = cache(3)
    for name in "abcad":
        ask(kept, name)
        assert kept.stats().bytes <= 3 * ROOM
    assert [ask(kept, name) for name in "acd"] == [False, False, False]
    assert kept.stats().evictions == 1
    assert ask(kept, "b")


@pytest.mark.parametrize(("capacity", "size"), [(0, 0), (ROOM, ROOM)])
def test_what_does_not_fit_is_given_but_not_kept(capacity, size):
    """Without capacity, or where a value is larger, every call computes."""
    kept = Cache(capacity, lambda value: size)
    assert [kept.get_or_compute(("", b"a"), lambda n=n: n) for n in range(3)] == [0, 1, 2]
    assert kept.stats().bytes == kept.stats().evictions == 0


def test_tenants_do_not_meet():
    """No tenant is given another's value, and a full one makes room among its own."""
    kept = cache(6, tenant_entries=2)
    assert ask(kept, "a", "one")
    assert ask(kept, "a", "two")
    assert [ask(kept, name, "one") for name in "bcd"] == [True, True, True]
    assert not ask(kept, "a", "two")
    assert [ask(kept, name, "one") for name in "dca"] == [False, False, True]


def test_nobody_in_particular_has_all_the_room():
    """Calls without a tenant are everybody's, and are not bound as one."""
    kept = cache(6, tenant_entries=2)
    assert [ask(kept, name) for name in "abcdabcd"] == [True] * 4 + [False] * 4


def test_a_full_cache_makes_room_among_all():
    """Where all tenants together are too many, the least recently used goes, whosever it is."""
    kept = cache(2)
    for tenant in ("one", "two", "three"):
        ask(kept, "a", tenant)
    assert [ask(kept, "a", tenant) for tenant in ("three", "two", "one")] == [False, False, True]


def test_a_value_is_forgotten_in_time_however_often_it_is_used():
    """Its seconds count from when it was made; purge() drops it from memory where nobody asks."""
    clock = Clock()
    kept = cache(4, seconds=10, clock=clock)
    ask(kept, "a")
    clock.now = 9
    assert not ask(kept, "a")
    ask(kept, "b")
    clock.now = 10
    kept.purge()
    assert kept.stats().entries == 1
    assert ask(kept, "a")
    assert not ask(kept, "b")


def test_digests_keep_parts_apart():
    """Parts of other lengths, kinds, types and shapes are other digests; where an array lies in memory is nothing."""
    array = np.arange(6, dtype=np.float32)
    different = [("ab", "c"), ("a", "bc"), ("abc",), (b"ab", "c"), (array,), (array.reshape(2, 3),)]
    different += [(array.astype(np.float64),), (array.view(np.int32),), (array[::-1],), ()]
    assert len({digest(*parts) for parts in different}) == len(different)
    assert digest(array.reshape(2, 3).T) == digest(np.ascontiguousarray(array.reshape(2, 3).T))


# --- several calls at once


class Together:
    """Calls for one key, of which one computes; it goes on when all others wait, which they show by polling."""

    def __init__(self, kept, calls):
        self.kept, self.calls = kept, calls
        self.waiting, self.all_wait, self.computed = set(), threading.Event(), 0

    def run(self, compute, gone=lambda number: False):
        """What each call gave or raised. Call 0 computes first; `gone` tells whether a waiting call is cancelled."""
        begun = threading.Event()

        def first():
            begun.set()
            assert self.all_wait.wait(20)
            return self.count(compute)

        def polled(number):
            self.waiting.add(number)
            if len(self.waiting) == self.calls - 1:
                self.all_wait.set()
            return gone(number)

        with ThreadPoolExecutor(self.calls) as threads:
            results = [threads.submit(self.kept.get_or_compute, ("", b"k"), first)]
            assert begun.wait(20)
            for number in range(1, self.calls):
                again = (("", b"k"), lambda: self.count(compute), lambda number=number: polled(number))
                results.append(threads.submit(self.kept.get_or_compute, *again))
            return [result.exception(20) or result.result() for result in results]

    def count(self, compute):
        self.computed += 1
        return compute(self.computed)


@pytest.mark.parametrize("capacity", [0, ROOM])
def test_calls_at_once_compute_once(capacity):
    """Of 16 misses at once one computes and the others get its value, even where nothing is kept."""
    calls = Together(Cache(capacity, lambda value: 8), CALLS)
    assert calls.run(lambda count: 7) == [7] * CALLS
    assert calls.computed == 1
    assert (calls.kept.stats().hits, calls.kept.stats().misses) == (CALLS - 1, 1)


def test_an_error_reaches_all_who_wait_and_is_not_kept():
    """Calls at once fail with the error of the one that computed; the next call computes again."""

    def fail(count):
        raise InternalError("not finite")

    calls = Together(cache(4), CALLS)
    assert [type(result) for result in calls.run(fail)] == [InternalError] * CALLS
    assert calls.computed == 1
    assert ask(calls.kept, "k")


def test_one_who_waits_takes_over_from_one_who_is_cancelled():
    """A caller that goes away takes nobody with it: of those who wait one computes, for all."""

    def compute(count):
        if count == 1:
            raise Cancelled("The request was cancelled.")
        return count

    calls = Together(cache(4), CALLS)
    first, *others = calls.run(compute)
    assert isinstance(first, Cancelled)
    assert others == [2] * (CALLS - 1)


def test_who_is_cancelled_stops_waiting():
    """A call that waits ends when its own request does, before the one that computes."""
    kept, begun, release = cache(4), threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert release.wait(20)
        return 7

    with ThreadPoolExecutor(1) as threads:
        computing = threads.submit(kept.get_or_compute, ("", b"k"), slow)
        assert begun.wait(20)
        with pytest.raises(Cancelled):
            kept.get_or_compute(("", b"k"), slow, lambda: True)
        assert not computing.done()
        release.set()
        assert computing.result(20) == 7


def test_asked_and_purged_at_once_the_counts_stay_true():
    """While one thread computes, and fails in every third call, and another purges, bytes are those of the entries."""
    kept, over = Cache(8 * ROOM, lambda value: 900, seconds=1e-5), threading.Event()

    def purge():
        while not over.is_set():
            kept.purge()
            stats = kept.stats()
            assert stats.bytes == stats.entries * (900 + ENTRY_BYTES) <= 8 * ROOM

    def compute(number):
        if number % 3 == 0:
            raise MemoryError
        return number

    with ThreadPoolExecutor(1) as threads:
        purging = threads.submit(purge)
        for number in range(3000):
            with suppress(MemoryError):
                kept.get_or_compute(("", bytes([number % 20])), lambda number=number: compute(number))
        over.set()
        purging.result(20)
    assert not kept._pending


# --- the stages


class Counting(Found):
    """A detector that counts how often it is asked; and, for the reader beside it, the photos that are read."""

    asked = read = 0

    def find(self, rgb):
        self.asked += 1
        return super().find(rgb)


def detector(*faces, clock=None):
    """A FaceDetector with a cache, its detector, and a reader whose photos are told apart by their text."""
    finder = Counting(*faces)

    def read(photo, name):
        if photo.base64 == "damaged":
            raise PhotoUnreadable(f"{name} is damaged")
        finder.read += 1
        return np.roll(PHOTO, len(photo.base64 or photo.url), axis=0)

    models = FaceModels(finder, Means(), None, Halves(), {"scrfd.onnx": "00"})
    caches = [Cache(10**8, size, LIFETIME, clock=clock or Clock()) for size in (lambda value: 1000, len)]
    return FaceDetector(read, models, *caches), finder


def person(*photos, **options):
    return Person(photos=[Photo(base64=photo) for photo in photos], **options)


def test_a_photo_is_searched_once():
    """The same pixels, alone or beside others, are not searched again; each face says which photo it is of."""
    faces, finder = detector(LEFT, RIGHT)
    first = faces.detect(person("a", "bb"), 0)
    again = faces.detect(person("bb", "ccc", "a"), 1)
    assert finder.asked == 3
    assert [face.box.photo for face in again.faces] == [0, 1, 2]
    assert again.faces[0].embedding is first.faces[1].embedding
    assert again.trace.models == first.trace.models == {"scrfd.onnx": "00"}


def test_a_photo_is_decoded_once_and_an_address_read_every_time():
    """The same text is known by its text, for each tenant; other text of the same pixels, by its pixels."""
    faces, finder = detector(LEFT)
    for photo, tenant in (("aa", ""), ("aa", ""), ("bb", ""), ("aa", "another")):
        faces.detect(person(photo), 0, tenant)
    assert (finder.read, finder.asked) == (3, 2)
    address = Person(photos=[Photo(url="https://a.example/photo")])
    for _ in range(2):
        faces.detect(address, 0)
    assert (finder.read, finder.asked) == (5, 3)


@pytest.mark.parametrize("other", [{"face": "left"}, {"face": 0}])
def test_another_choice_of_face_is_another_key(other):
    """`face` is part of what a face is found by."""
    faces, finder = detector(LEFT, RIGHT)
    used = [faces.detect(person("a", **options), 0).faces[0].box.box for options in ({}, other)]
    assert used == [tuple(RIGHT.box.tolist()), tuple(LEFT.box.tolist())]


def test_a_tenants_faces_are_its_own():
    """Another tenant's photo is searched again."""
    faces, finder = detector(LEFT)
    for tenant in ("one", "two", "one"):
        faces.detect(person("a"), 0, tenant)
    assert finder.asked == 2


def test_errors_hold_on_a_hit_and_name_the_photo_of_the_request():
    """A photo is read and refused as before, whatever is kept; what is missing is told with this request's names."""
    faces, finder = detector(LEFT)
    faces.detect(person("a"), 0)
    with pytest.raises(PhotoUnreadable, match=r"people\[1\]\.photos\[1\] is damaged"):
        faces.detect(person("a", "damaged"), 1)
    for index in (2, 3):
        with pytest.raises(FaceIndexOutOfRange, match=rf"people\[{index}\]\.face is 1, .*photos\[0\] has 1 face"):
            faces.detect(person("a", face=1), index)
    assert finder.asked == 2
    blind, searched = detector()
    for index in (0, 1):
        with pytest.raises(NoFace, match=rf"people\[{index}\]\.photos\[0\] shows no face"):
            blind.detect(person("a"), index)
    assert searched.asked == 1


def test_a_photo_of_a_cancelled_request_is_not_searched():
    """Who goes away while its photo is read, or while it waits for the networks, costs no search."""
    faces, finder = detector(LEFT)
    answers = iter([False, True])
    with pytest.raises(Cancelled):
        faces.detect(person("a"), 0, cancelled=lambda: next(answers))
    assert finder.asked == faces.cache.stats().entries == 0


@pytest.fixture
def settings(tmp_path):
    return Settings(device="cpu", weights_dir=tmp_path)


def calls_of(*networks):
    """A list that grows by one whenever one of the networks runs."""
    calls = []
    for network in networks:
        network.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_an_identity_is_encoded_once(settings):
    """The networks see the same faces once a tenant and fusion; a hit has its own boxes and its own seconds."""
    encoder = IdentityEncoder.load(settings)
    calls = calls_of(encoder._eva_clip, encoder._idformer)
    first, again = encoder.encode(small.faces(1), "mean"), encoder.encode(small.faces(1), "mean")
    assert len(calls) == 2
    assert again.tokens is first.tokens
    assert again.trace.seconds["identity"] != first.trace.seconds["identity"]
    assert again.trace.models == first.trace.models
    assert len(again.boxes) == 1
    for options in (("concat", ""), ("mean", "another")):
        np.testing.assert_array_equal(encoder.encode(small.faces(1), *options).tokens, first.tokens)
    assert len(calls) == 6
    encoder.encode(small.faces(2), "mean")
    assert len(calls) == 8


def test_an_identity_that_failed_is_not_kept(settings):
    """Numbers that are not finite are an error every time."""
    encoder = IdentityEncoder.load(settings)
    bad = small.faces(1)
    bad.faces[0].embedding[0] = np.nan
    for _ in range(2):
        with pytest.raises(InternalError, match="not finite"):
            encoder.encode(bad)
    assert encoder.cache.stats().entries == 0


def test_a_prompt_is_read_once(settings):
    """T5 and CLIP see a prompt once a length; a hit is the same to the last bit, and has its own seconds."""
    encoder = TextEncoder.load(settings)
    calls = calls_of(encoder._t5, encoder._clip)
    fresh = TextEncoder((encoder._t5_tokenizer, encoder._t5), (encoder._clip_tokenizer, encoder._clip), {})
    first, again = encoder.encode("a man", 128), encoder.encode("a man", 128)
    assert len(calls) == 2
    expected = fresh.encode("a man", 128)
    np.testing.assert_array_equal(again.tokens, expected.tokens)
    np.testing.assert_array_equal(again.pooled, expected.pooled)
    assert again.trace.seconds["text"] != first.trace.seconds["text"]
    assert again.trace.models == first.trace.models != {}
    encoder.encode("a woman", 128)
    encoder.encode("a man", 16)
    assert len(calls) == 8


def test_what_is_kept_cannot_be_written_to(settings):
    """Nobody who is given a value can alter what the next one gets."""
    face = detector(LEFT)[0].detect(person("a"), 0).faces[0]
    text = TextEncoder.load(settings).encode("a man", 128)
    tokens = IdentityEncoder.load(settings).encode(small.faces(1, photos=2), "concat").tokens
    for array in (face.embedding, face.features, face.landmarks, text.tokens, text.pooled, tokens):
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.setflags(write=True)


def test_the_settings_bound_the_caches(settings):
    """Bytes, those of a tenant and lifetimes are those that are set; 0 bytes keep nothing."""
    off = settings.model_copy(update={"cache": CacheSettings(identity_bytes=0, prompt_bytes=0)})
    encoder, reader = IdentityEncoder.load(off), TextEncoder.load(off)
    for _ in range(2):
        encoder.encode(small.faces(1))
        reader.encode("a man", 128)
    assert (encoder.cache.stats().misses, reader.cache.stats().misses) == (2, 2)
    one = settings.model_copy(update={"cache": CacheSettings(tenant_bytes=20_000)})
    encoder = IdentityEncoder.load(one)
    for number, tenant in ((1, "a"), (2, "a"), (3, "b")):
        encoder.encode(small.faces(number), "mean", tenant)
    assert (encoder.cache.stats().entries, encoder.cache.stats().evictions) == (2, 1)


def test_a_replica_forgets_with_its_health_check(settings):
    """A face or an identity whose time is over is dropped from memory, even where no call comes any more."""
    brief = settings.model_copy(update={"cache": CacheSettings(identity_seconds=1e-9)})
    encoder = IdentityEncoder.load(brief)
    replica = IdentityReplica(brief, lambda _: encoder)
    encoder.encode(small.faces(1))
    assert len(encoder.cache._entries) == 1
    replica.check_health()
    assert len(encoder.cache._entries) == 0


def test_a_replica_forgets_photos_with_its_health_check():
    """A photo that is known by its text is dropped as its face is."""
    clock = Clock()
    faces, finder = detector(LEFT, clock=clock)
    replica = FacesReplica(Settings(device="cpu"), lambda _: faces)
    faces.detect(person("a"), 0)
    assert len(faces._known._entries) == len(faces.cache._entries) == 1
    clock.now = LIFETIME
    replica.check_health()
    assert len(faces._known._entries) == len(faces.cache._entries) == 0
    faces.detect(person("a"), 0)
    assert (finder.read, finder.asked) == (2, 2)
