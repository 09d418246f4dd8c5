"""What a stranger's address may and may not make this service do. See tests/web.py for the server."""

import threading
from ipaddress import ip_address

import pytest

from pipeline.errors import PhotoAddressRefused, PhotoError, PhotoFetchFailed, PhotoTooLarge
from pipeline.fetch import Fetcher, s3_client
from pipeline.network import Network, is_public
from pipeline.settings import PhotoSettings, Settings, StoreSettings
from tests.s3 import BUCKET, CREDENTIALS, access_checked, cuts_the_answer, failing, s3_server, stalls
from tests.web import HOST, drip, head, ok, pour, redirect, web_server

BODY = bytes(range(256)) * 1000
URL = f"https://{HOST}/a"
TLS = Network().tls  # made once: it reads the authorities that TLS trusts


def fetch(web, address=URL, hosts=None, **photos):
    settings = Settings(photos=PhotoSettings(**{"fetch_seconds": 10.0, **photos}))
    return Fetcher(settings, web.network(**hosts or {})).fetch(address)


def outside(resolve, **settings):
    """A fetcher as in production, but for the resolver."""
    return Fetcher(Settings(**settings), Network(resolve, tls=TLS))


def nowhere(host):
    raise AssertionError(f"{host} was resolved")


def test_a_photo_arrives():
    """The bytes come as they are, whatever Content-Type says; the host's name is asked for in TLS and HTTP."""
    with web_server({"/a?b=1": ok(BODY, "Content-Type: text/html")}) as web:
        assert fetch(web, f"HTTPS://{HOST.upper()}:443/a?b=1") == BODY
        assert web.names == web.resolved == [HOST]
        assert f"Host: {HOST}" in web.requests[0]
        assert "Accept-Encoding: identity" in web.requests[0]


def test_a_name_is_resolved_once_and_the_connection_pinned():
    """A name that changes its address between the check and the connection (TTL 0) leads nowhere else."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"], ["10.0.0.1"]])
    with web_server({"/a": ok(BODY)}) as web:
        plain = web.network()
        network = Network(lambda host: next(answers), plain.allows, plain.tls, plain.port)
        assert Fetcher(Settings(), network).fetch(URL) == BODY
    assert next(answers) == ["10.0.0.1"]
    assert len(list(answers)) == 1


def test_the_next_address_is_tried():
    """A host of which one address does not answer is reached at another."""
    with web_server({"/a": ok(BODY)}) as web:
        plain = web.network()
        network = Network(lambda host: ["127.0.0.9", "127.0.0.1"], lambda address: True, plain.tls, plain.port)
        assert Fetcher(Settings(), network).fetch(URL) == BODY


def test_the_environment_has_no_say(monkeypatch):
    """A proxy of the environment would resolve the name again, unchecked; none is used."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with web_server({"/a": ok(BODY)}) as web:
        assert fetch(web) == BODY


ODD_ADDRESSES = {
    "other schemes": [
        "file:///etc/passwd", "gopher://photos.example/_x", "ftp://photos.example/a", "http://photos.example/a",
        "http://user@photos.example/a", "data:image/png;base64,AAAA", "javascript:alert(1)", "", "://",
        "//photos.example/a",
    ],
    "ports and users": [
        "https://photos.example:22/", "https://photos.example:6379/", "https://photos.example:8265/",
        "https://photos.example:10001/", "https://photos.example:443@evil.example/", "https://photos.example:/a",
        "https://user@photos.example/a", "https://user:key@photos.example/a", "https://@photos.example/a",
    ],
    "this machine": [
        "https://localhost/", "https://127.0.0.1/", "https://2130706433/", "https://0177.1/", "https://0x7f.1/",
        "https://127.1/", "https://0x7f000001/", "https://0.0.0.0/", "https://0/", "https://[::1]/", "https://[::]/",
        "https://[::ffff:169.254.169.254]/", "https://169.254.169.254/latest/meta-data/", "https://[fd00::1]/",
        "https://100.64.0.1/", "https://93.184.216.34/", "https://sub.localhost/", "https://localhost./",
    ],
    "names of the inside": [
        "https://metadata.google.internal/", "https://redis.default.svc.cluster.local/", "https://metadata/",
        "https://kubernetes.default.svc.cluster.local./", "https://printer.lan/", "https://1.0.0.127.in-addr.arpa/",
    ],
    "look-alikes": [
        "https://phot\u043es.example/a", "https://photo\u017f.example/a", "https://xn--phots-jye.example/a",
        "https://photos\u3002example/a", "https://\uff50hotos.example/a", "https://photos.example/\u00fc.jpg",
    ],
    "confusions": [
        "https://photos.example\\@evil.example/", "https://photos.example\\.evil.example/", "https://photos.example/a\\b",
        "https://photos.example#@evil.example/", "https://photos.example/a#b", "https://photos.example /a",
        "https://photos.example\t/a", "https://photos.example/a\r\nHost: evil.example", "https://photos.example/a\n",
        "https://photos%2eexample/a", "https://photos..example/", "https://.example/", "https://-a.example/",
        "https:///a", "https:/photos.example/a", "https:photos.example/a", " https://photos.example/a",
        f"https://{'a' * 64}.example/", "https://photos.example/\x00", "https://photos.example;evil.example/",
    ],
}  # fmt: skip


@pytest.mark.parametrize("address", [url for urls in ODD_ADDRESSES.values() for url in urls])
def test_odd_addresses_are_refused(address):
    """An address is refused before anything is resolved, unless it is plain https to a public-looking name."""
    with pytest.raises(PhotoAddressRefused):
        outside(nowhere).fetch(address)


NOT_PUBLIC = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192", "192.0.2.1", "192.88.99.1", "198.18.0.1",
    "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16", "::", "::1", "::7f00:1",
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2001::1",
    "2001:db8::1", "3fff::1", "fd00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "5f00::1",
]  # fmt: skip
PUBLIC = [
    "93.184.216.34",
    "1.1.1.1",
    "172.32.0.1",
    "100.128.0.1",
    "2606:4700::1111",
    "64:ff9b::101:101",
    "::ffff:1.1.1.1",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_a_name_that_leads_inside_is_refused(address):
    """It is enough that one of a name's addresses is not public; no connection is made to the others."""
    for found in ([address], ["93.184.216.34", address]):
        with pytest.raises(PhotoAddressRefused) as refusal:
            outside(lambda host, found=found: found).fetch(URL)
        assert address not in str(refusal.value)  # what a name means inside is nobody's business


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address):
    """The public internet is not refused."""
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("https://inside.example/a", PhotoAddressRefused),
        ("//inside.example/a", PhotoAddressRefused),
        (f"http://{HOST}/a", PhotoAddressRefused),
        ("https://127.0.0.1/a", PhotoAddressRefused),
        ("file:///etc/passwd", PhotoAddressRefused),
        ("s3://pictures/a", PhotoAddressRefused),
        ("/\\inside.example/a", PhotoAddressRefused),
        ("https://[::1/a", PhotoAddressRefused),
        ("https://user@inside.example/", PhotoAddressRefused),
        ("/start", PhotoFetchFailed),
        ("", PhotoFetchFailed),
        ("/1", PhotoFetchFailed),
    ],
)
def test_redirects_are_checked_like_the_first_address(location, error):
    """A redirect inside, to http, to another scheme, in a circle, or a fourth one ends the fetch."""
    chain = {f"/{n}": redirect(f"/{n + 1}") for n in range(1, 12)}
    with web_server({"/start": redirect(location), **chain}) as web:
        with pytest.raises(error):
            fetch(web, f"https://{HOST}/start", {"inside_example": ["10.0.0.1"]})
        assert len(web.requests) <= 4


def test_three_redirects_are_followed():
    """Each hop is resolved anew, relative ones too, and no cookie comes along."""
    hops = {"/1": redirect(f"https://b.{HOST}/2"), "/2": redirect("3"), "/3": redirect(f"//c.{HOST}/4"), "/4": ok(BODY)}
    with web_server(hops) as web:
        assert fetch(web, f"https://{HOST}/1") == BODY
        assert web.resolved == [HOST, f"b.{HOST}", f"b.{HOST}", f"c.{HOST}"]
        assert not any("cookie" in request.lower() for request in web.requests)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (pour, PhotoTooLarge),
        (head("200 OK", "Content-Length: 99999999999") + 2 * BODY, PhotoTooLarge),
        (drip(head("200 OK", "Content-Length: 100000")), PhotoFetchFailed),
        (drip(b"HTTP/1.1 200 OK\r\nX-Slow: "), PhotoFetchFailed),
        (drip(b""), PhotoFetchFailed),
        (lambda connection, closing: closing.wait(10), PhotoFetchFailed),
        (lambda connection, closing: connection.sendall(ok(BODY)[:-1]), PhotoFetchFailed),
        (head("200 OK", "Content-Length: 5", "Content-Length: 6") + b"hello", PhotoFetchFailed),
        (head("200 OK", "Content-Length: -1"), PhotoFetchFailed),
        (head("200 OK", "Transfer-Encoding: chunked") + b"zz\r\n", PhotoFetchFailed),
        (ok(BODY, "Content-Encoding: gzip"), PhotoFetchFailed),
        (b"no HTTP at all\r\n\r\n", PhotoFetchFailed),
        (head("200 OK", "X-Long: " + "x" * 300_000), PhotoFetchFailed),
        (head("204 No Content"), PhotoFetchFailed),
        (head("206 Partial Content", "Content-Length: 1") + b"x", PhotoFetchFailed),
        (head("404 Not Found", "Content-Length: 0"), PhotoFetchFailed),
        (head("500 Oh", "Content-Length: 0"), PhotoFetchFailed),
    ],
)
def test_bad_servers(answer, error):
    """Endless, slow, cut off, mislabelled or broken answers end in time, with a sentence."""
    with web_server({"/a": answer}) as web, pytest.raises(error) as raised:
        fetch(web, max_bytes=300_000, fetch_seconds=1.0)
    assert str(raised.value).endswith(".")


def test_what_goes_beyond_the_stated_length_is_not_read():
    """A Content-Length that is too small cuts the photo; decoding will say so."""
    with web_server({"/a": head("200 OK", "Content-Length: 3") + b"abcdef"}) as web:
        assert fetch(web) == b"abc"


def test_the_certificate_must_fit():
    """A certificate of another host, or of an authority nobody trusts, is no photo."""
    with web_server({"/a": ok(BODY)}) as web:
        with pytest.raises(PhotoFetchFailed):
            fetch(web, "https://other.example/a")
        plain = web.network()
        with pytest.raises(PhotoFetchFailed):
            Fetcher(Settings(), Network(plain.resolve, plain.allows, TLS, plain.port)).fetch(URL)
        assert web.requests == []


def test_a_name_that_does_not_resolve():
    """An unknown host, a host without addresses and a resolver that takes for ever are the address's fault."""

    def unknown(host):
        raise OSError("no such name")

    waiting = threading.Event()
    settings = PhotoSettings(fetch_seconds=0.2)
    for resolve in (unknown, lambda host: [], lambda host: waiting.wait(5) or []):
        with pytest.raises(PhotoFetchFailed):
            outside(resolve, photos=settings).fetch(URL)
    waiting.set()


def test_urls_can_be_switched_off():
    """With photos.urls off, no https address is read."""
    with pytest.raises(PhotoAddressRefused):
        outside(nowhere, photos=PhotoSettings(urls=False)).fetch(URL)


@pytest.mark.parametrize(
    "address",
    [
        "https://pictures.s3.amazonaws.com/images/1/0.png?X-Amz-Signature=0",
        "https://pictures.s3.eu-west-1.amazonaws.com/images/1/0.png",
        "https://s3.eu-west-1.amazonaws.com/pictures/images/1/0.png",
        "https://s3.amazonaws.com/%70ictures/images/1/0.png",
        "https://s3.amazonaws.com/other/../pictures/images/1/0.png",
        "https://minio.example.com/pictures/images/1/0.png?X-Amz-Signature=0",
        "https://Pictures.minio.example.com/images/1/0.png",
    ],
)
def test_links_into_our_own_store_are_refused(address):
    """A presigned link of our own store is somebody's picture, not a photo to draw from."""
    store = StoreSettings(url="s3://pictures/p", endpoint_url="https://minio.example.com", region="eu-west-1")
    with pytest.raises(PhotoAddressRefused, match="own store"):
        outside(nowhere, store=store).fetch(address)


@pytest.fixture(scope="module")
def s3():
    with s3_server() as endpoint:
        yield endpoint


def s3_fetcher(endpoint, monkeypatch, **photos):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    settings = Settings(store=s3_store(endpoint), photos=PhotoSettings(**{"buckets": (BUCKET, "gone"), **photos}))
    return Fetcher(settings, Network(nowhere, tls=TLS))


def s3_store(endpoint):
    return StoreSettings(endpoint_url=endpoint, path_style=True, attempts=1, region="us-east-1")


def put(endpoint, key, data):
    s3_client(s3_store(endpoint)).put_object(Bucket=BUCKET, Key=key, Body=data)


def test_a_photo_from_s3(s3, monkeypatch):
    """An object of a listed bucket arrives, whatever its key looks like, if it is small enough."""
    fetcher = s3_fetcher(s3, monkeypatch, max_bytes=len(BODY))
    for key in ("a b/ü?#%2e.jpg", "a"):
        put(s3, key, BODY)
        assert fetcher.fetch(f"S3://{BUCKET}/{key}") == BODY
    put(s3, "a", BODY + b"x")
    with pytest.raises(PhotoTooLarge):
        fetcher.fetch(f"s3://{BUCKET}/a")


@pytest.mark.parametrize(
    "address",
    [
        "s3://other/a",
        "s3://Pictures/a",
        f"s3://{BUCKET}",
        f"s3://{BUCKET}/",
        f"s3://{BUCKET}/../other/a",
        f"s3://{BUCKET}/./a",
        f"s3://{BUCKET}/a\n",
        "s3:///a",
        "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/x",
    ],
)
def test_other_buckets_are_refused(s3, monkeypatch, address):
    """Only listed buckets are read, and a key cannot lead out of its bucket."""
    with pytest.raises(PhotoAddressRefused):
        s3_fetcher(s3, monkeypatch).fetch(address)


def test_without_listed_buckets_s3_is_refused():
    """By default no bucket is read."""
    with pytest.raises(PhotoAddressRefused):
        Fetcher(Settings()).fetch(f"s3://{BUCKET}/a")


def test_s3_failures_are_sentences(s3, monkeypatch):
    """A missing object or bucket, no rights, a server that is down, silent or breaks off: each is told."""
    fetcher = s3_fetcher(s3, monkeypatch)
    put(s3, "there", BODY)
    problems: list[PhotoError] = []

    def fails(fetcher, address=f"s3://{BUCKET}/there"):
        with pytest.raises(PhotoFetchFailed) as raised:
            fetcher.fetch(address)
        problems.append(raised.value)

    fails(fetcher, f"s3://{BUCKET}/nothing")
    fails(fetcher, "s3://gone/a")
    with access_checked(s3):
        fails(fetcher)
    with failing(s3, stalls) as faulty:
        fails(s3_fetcher(faulty.endpoint, monkeypatch, fetch_seconds=0.3))
    with failing(s3, cuts_the_answer) as faulty:
        fails(s3_fetcher(faulty.endpoint, monkeypatch))
    fails(s3_fetcher("http://127.0.0.1:1", monkeypatch))
    assert all(str(problem).endswith(".") and BUCKET not in str(problem) for problem in problems)
