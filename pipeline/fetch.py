"""Guarded reading of a photo's address: https:// from the public internet, s3:// from listed buckets.

An address comes from a stranger. It is parsed once, strictly, and what was parsed is connected to; a redirect is
a new address and is checked like the first. Bytes and seconds are bounded.
"""

from collections.abc import Iterable
from contextlib import closing
from urllib.parse import unquote, urljoin, urlsplit

import httpcore

from pipeline.errors import PhotoAddressRefused, PhotoFetchFailed, PhotoTooLarge
from pipeline.network import Network, NotPublic, UnknownHost, https_url, within
from pipeline.s3 import s3_client
from pipeline.settings import Settings, StoreSettings

AMAZON = ("amazonaws.com", "amazonaws.com.cn")
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS: list[tuple[bytes | str, bytes | str]] = [
    ("User-Agent", "pulid-serve"),
    ("Accept", "image/jpeg, image/png, image/webp"),
    ("Accept-Encoding", "identity"),
]

ODD = (
    "has an address this service does not read; give a plain https:// address of a public host: no user name, no port "
    "but 443, no number or xn-- name for a host, no # and no \\, and what is not ASCII percent-encoded."
)
INWARD = "has an address that does not lead to the public internet alone; give another."
BROKEN = (
    "could not be read from its address: the connection failed or broke off; check the address and its certificate."
)


class Fetcher:
    """Reads the bytes behind a photo's address, bounded in size and time.

    The messages of its errors go on from a photo's name: "has an address ...".
    """

    def __init__(self, settings: Settings, network: Network | None = None) -> None:
        self._photos = settings.photos
        self._network = network or Network()
        self._s3 = s3_client(settings.store) if self._photos.buckets else None
        self._own_bucket, self._s3_hosts = _own_store(settings.store)

    def fetch(self, address: str) -> bytes:
        """The bytes behind an https:// or s3:// address.

        Raises PhotoAddressRefused, PhotoFetchFailed, PhotoTooLarge.
        """
        scheme, _, rest = address.partition("://")
        if scheme.lower() == "s3":
            bucket, _, key = rest.partition("/")
            return self._from_s3(bucket, key)
        if scheme.lower() != "https":
            raise PhotoAddressRefused("has an address that is not read; give one that starts with https:// or s3://.")
        if not self._photos.urls:
            raise PhotoAddressRefused("is an https:// address, and this service reads none; send base64 instead.")
        try:
            return self._from_web(address)
        except httpcore.TimeoutException as error:
            raise self._too_slow() from error
        except NotPublic as error:
            raise PhotoAddressRefused(INWARD) from error
        except UnknownHost as error:
            raise PhotoFetchFailed("has an address whose host name is not known; check it.") from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise PhotoFetchFailed(BROKEN) from error

    def _from_web(self, address: str) -> bytes:
        redirects = self._photos.max_redirects
        with self._network.connections(self._photos.fetch_seconds) as connections:
            for _ in range(redirects + 1):
                with connections.stream("GET", self._checked(address), headers=HEADERS) as answer:
                    if answer.status not in REDIRECTS:
                        return self._body(answer)
                    address = _location(address, answer)
        raise PhotoFetchFailed(f"is redirected more than {redirects} times; give its final address.")

    def _checked(self, address: str) -> httpcore.URL:
        url = https_url(address)
        if url is None:
            raise PhotoAddressRefused(ODD)
        if self._is_own_store(url.host.decode(), unquote(url.target.decode().partition("?")[0])):
            # Its links are made for one caller; fetched here they would show that caller's pictures to another.
            raise PhotoAddressRefused("has an address in this service's own store; send the picture itself instead.")
        return url

    def _is_own_store(self, host: str, path: str) -> bool:
        at_s3 = any(host == known or host.endswith(f".{known}") for known in self._s3_hosts)
        return at_s3 and (host.startswith(f"{self._own_bucket}.") or self._own_bucket in path.split("/"))

    def _body(self, answer: httpcore.Response) -> bytes:
        if answer.status != 200:
            raise PhotoFetchFailed(f"was answered with {answer.status} by its address; give one that answers with 200.")
        if any(name.lower() == b"content-encoding" and value.lower() != b"identity" for name, value in answer.headers):
            raise PhotoFetchFailed("is sent with a Content-Encoding that was not asked for; give another address.")
        return self._bounded(answer.iter_stream())

    def _from_s3(self, bucket: str, key: str) -> bytes:
        if self._s3 is None or bucket not in self._photos.buckets:
            raise PhotoAddressRefused("is in a bucket this service does not read photos from; send base64 instead.")
        # urllib3 resolves dots in a path, which would lead to another bucket.
        if not key or not key.isprintable() or not {".", ".."}.isdisjoint(key.split("/")):
            raise PhotoAddressRefused("has an s3:// address without a usable key; give s3://bucket/key.")
        from botocore.exceptions import BotoCoreError, ClientError

        client = self._s3

        def read() -> bytes:
            with closing(client.get_object(Bucket=bucket, Key=key)["Body"]) as body:
                return self._bounded(body.iter_chunks(2**16))

        try:
            return within(self._photos.fetch_seconds, read)
        except TimeoutError as error:
            raise self._too_slow() from error
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            why = {403: "may not be read by this service", 404: "is not there"}.get(status, "was not given by S3")
            raise PhotoFetchFailed(f"{why}; check the bucket, the key and its rights.") from error
        except BotoCoreError as error:
            raise PhotoFetchFailed(
                "could not be read from S3, which did not answer as it should; try again."
            ) from error

    def _bounded(self, chunks: Iterable[bytes]) -> bytes:
        data = bytearray()
        for chunk in chunks:
            data += chunk
            if len(data) > self._photos.max_bytes:
                raise PhotoTooLarge(f"has more than {self._photos.max_bytes} bytes; send a smaller one.")
        return bytes(data)

    def _too_slow(self) -> PhotoFetchFailed:
        seconds = self._photos.fetch_seconds
        return PhotoFetchFailed(f"did not arrive within {seconds:g} seconds; give a faster address, or send base64.")


def _own_store(store: StoreSettings) -> tuple[str, tuple[str, ...]]:
    """The store's bucket and the hosts that serve it; for a folder: none."""
    if not store.url.startswith("s3://"):
        return "", ()
    endpoint = urlsplit(store.endpoint_url or "").hostname
    return store.url.removeprefix("s3://").partition("/")[0], (*AMAZON, *([endpoint] if endpoint else []))


def _location(address: str, answer: httpcore.Response) -> str:
    location = next((value for name, value in answer.headers if name.lower() == b"location"), b"")
    try:
        return urljoin(address, location.decode("ascii"))  # checked as a whole before anything is connected to
    except ValueError as error:
        raise PhotoAddressRefused(ODD) from error
