"""Webhooks: telling an address of the caller's that a job has come further. Signed by the Standard Webhooks scheme.

An address comes from a stranger and is treated like a photo's: plain https to the public internet, connections pinned
to what was checked, no redirect followed, seconds and bytes bounded. Logs name its host alone: the rest may be secret.
"""

import base64
import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from contextlib import suppress

import httpcore

from pipeline.errors import SettingsInvalid, WebhookRefused
from pipeline.network import Network, NotPublic, UnknownHost, https_url
from pipeline.settings import WebhookSettings

log = logging.getLogger(__name__)

PREFIX = "whsec_"
MIN_SECRET, MAX_SECRET = 24, 4096  # bytes; tenants know what is made of it, and could try all short ones
GONE = 410  # the receiver wants no more of it
MAX_ANSWER_BYTES = 65_536  # are read, so that a receiver can finish its answer; none is used
FIRST_DELAY, GROWTH, LONGEST_DELAY, JITTER = 10.0, 6.0, 21_600.0, 0.5

ODD = (
    "The webhook's address is one that this service does not send to; give a plain https:// address of a public host: "
    "no user name, no port but 443, no number or xn-- name for a host, no # and no \\, and only ASCII."
)
NONE_SENT = "This service sends no webhooks; leave out `webhook`, and follow the job's events instead."


def read_secret(settings: WebhookSettings) -> bytes:
    """The service's own secret, as its file has it now; empty where the settings name none.

    Raises SettingsInvalid, which quotes nothing of it.
    """
    if settings.secret_file is None:
        return b""
    path = settings.secret_file.expanduser()
    try:
        with path.open("rb") as file:
            secret = file.read(MAX_SECRET + 1).strip()
    except OSError as error:
        raise SettingsInvalid(f"The secret of webhooks, {path}, cannot be read ({error.strerror}).") from error
    if not MIN_SECRET <= len(secret) <= MAX_SECRET:
        needs = f"needs {MIN_SECRET} to {MAX_SECRET} bytes; `openssl rand -base64 32` makes one"
        raise SettingsInvalid(f"The secret of webhooks, {path}, {needs}.")
    return secret


def tenant_secret(secret: bytes, tenant: str) -> str:
    """The secret that a tenant checks its webhooks with: whsec_ and base64, made of the service's own `secret`.

    Raises WebhookRefused where the service has none.
    """
    if not secret:
        raise WebhookRefused(NONE_SENT)
    return PREFIX + base64.b64encode(_key(secret, tenant)).decode()


def sign(secret_key: bytes, delivery_id: str, timestamp: int, body: bytes) -> str:
    """The header webhook-signature; `timestamp` in seconds since 1970 (standardwebhooks.com, "Signature scheme")."""
    signed = b".".join((delivery_id.encode(), str(timestamp).encode(), body))
    return "v1," + base64.b64encode(hmac.digest(secret_key, signed, hashlib.sha256)).decode()


class Webhooks:
    """Sends webhooks, one try at a time; it keeps nothing of any of them."""

    def __init__(
        self, settings: WebhookSettings, network: Network | None = None, now: Callable[[], float] = time.time
    ) -> None:
        """`now` gives seconds since 1970. Raises SettingsInvalid where there should be a secret, and is none."""
        read_secret(settings)
        self._settings, self._network, self._now = settings, network or Network(), now
        self.attempts = settings.attempts  # of one delivery, the first included

    def check(self, url: str) -> None:
        """What can be known of an address before it is used; raises WebhookRefused."""
        if self._settings.secret_file is None:
            raise WebhookRefused(NONE_SENT)
        if https_url(url) is None:
            raise WebhookRefused(ODD)

    def deliver(self, url: str, delivery_id: str, body: bytes, tenant: str) -> bool | None:
        """Send JSON once; whether it arrived, or None where there is no use in trying again.

        Blocks for `webhooks.seconds` at most, and raises nothing. `delivery_id` (letters, digits, - and _) is the same
        in every try of one event: by it a receiver knows what it has had before. The timestamp is the try's own.
        """
        target = https_url(url)
        if target is None or self._settings.secret_file is None:
            log.warning("webhook %s is not sent: since it was asked for, the settings have changed", delivery_id)
            return None
        try:
            headers = self._headers(delivery_id, body, _key(read_secret(self._settings), tenant))
        except SettingsInvalid as error:  # its file was good when the service began
            log.error("webhook %s is not sent yet. %s", delivery_id, error)
            return False
        arrived, why = self._tried(target, headers, body)
        if not arrived:
            log.warning("webhook %s to %s: %s", delivery_id, target.host.decode(), why)
        return arrived

    def retry_delay(self, delivery_id: str, tries: int) -> float:
        """Seconds from the last of so many tries to the next; it grows, and is another for each delivery."""
        seconds = min(FIRST_DELAY * GROWTH ** max(0, tries - 1), LONGEST_DELAY)
        share = hashlib.sha256(f"{delivery_id}.{tries}".encode()).digest()[0] / 255
        return float(seconds * (1 + JITTER * share))

    def _headers(self, delivery_id: str, body: bytes, key: bytes) -> list[tuple[bytes | str, bytes | str]]:
        timestamp = int(self._now())
        return [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("User-Agent", "pulid-serve"),
            ("webhook-id", delivery_id),
            ("webhook-timestamp", str(timestamp)),
            ("webhook-signature", sign(key, delivery_id, timestamp, body)),
        ]

    def _tried(
        self, url: httpcore.URL, headers: list[tuple[bytes | str, bytes | str]], body: bytes
    ) -> tuple[bool | None, str]:
        seconds = self._settings.seconds
        try:
            with (
                self._network.connections(seconds) as connections,
                connections.stream("POST", url, headers=headers, content=body) as answer,
            ):
                _read(answer)
                return _judged(answer.status), f"answered with {answer.status}"
        except NotPublic:
            return None, "its name does not lead to the public internet alone"
        except UnknownHost:
            return False, "its name is not known"
        except httpcore.TimeoutException:
            return False, f"no answer within {seconds:g} seconds"
        except (httpcore.NetworkError, httpcore.ProtocolError):
            return False, "the connection failed or broke off, or its certificate is not trusted"


def _key(secret: bytes, tenant: str) -> bytes:
    return hmac.digest(secret, tenant.encode(), hashlib.sha256)


def _judged(status: int) -> bool | None:
    if status == GONE:
        return None
    return 200 <= status < 300


def _read(answer: httpcore.Response) -> None:
    """Read a little of an answer; its status has told everything already, whatever happens here."""
    count = 0
    with suppress(httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError):
        for chunk in answer.iter_stream():
            count += len(chunk)
            if count >= MAX_ANSWER_BYTES:
                return
