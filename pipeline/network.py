"""The way to the public internet: names resolved once, every address checked, connections pinned to what was checked.

Whoever names an address here may be a stranger, and this service stands inside somebody's network. Proxies of the
environment are not used: a proxy would resolve the name again, unchecked.
"""

import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from threading import Thread
from typing import TypeVar

import httpcore

T = TypeVar("T")
Address = IPv4Address | IPv6Address

# The one parser of addresses. Without ASCII, "ſ" would match "s".
HTTPS = re.compile(r"https://([a-z0-9.-]{1,253})(?::443)?([/?][!-\"$-\[\]-~]*)?", re.IGNORECASE | re.ASCII)
LABEL = re.compile(r"(?!xn--)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
TOP_LABEL = re.compile(r"[a-z]{2,63}")  # so that 127.1, 0x7f.1 and 2130706433 are no host names
INSIDE = {"arpa", "corp", "home", "internal", "invalid", "lan", "local", "localdomain", "localhost", "onion", "test"}

UNICAST = ip_network("2000::/3")
CARRIERS = (ip_network("::ffff:0:0/96"), ip_network("64:ff9b::/96"))  # IPv4-mapped, NAT64: an IPv4 address inside
# What Python 3.11 calls global and is not: protocol assignments (Oracle's metadata among them), 6to4's relay and its
# addresses, documentation (RFC 9637); and Azure's host, which every machine there reaches at a public address.
NOT_PUBLIC = tuple(
    ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "2002::/16", "3fff::/20", "168.63.129.16/32")
)


class NotPublic(httpcore.ConnectError):
    """A host's name leads elsewhere than to the public internet alone."""


class UnknownHost(httpcore.ConnectError):
    """A host's name is not known."""


def https_url(address: str) -> httpcore.URL | None:
    """What a plain https:// address of a public-looking host connects to; None for every other address."""
    match = HTTPS.fullmatch(address)
    host = match[1].lower() if match else ""
    *labels, top = host.split(".")
    well_formed = labels and TOP_LABEL.fullmatch(top) and all(LABEL.fullmatch(label) for label in labels)
    if not match or not well_formed or top in INSIDE:
        return None
    target = match[2] or "/"
    return httpcore.URL(scheme="https", host=host, port=443, target=target if target.startswith("/") else f"/{target}")


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, wherever this service runs.

    Not: private, shared, loopback, link-local (so the clouds' metadata), multicast, reserved and documentation
    addresses, nor an IPv6 address that carries such an IPv4 address.
    """
    if isinstance(address, IPv6Address):
        if any(address in network for network in CARRIERS):
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in UNICAST:
            return False
    special = address.is_multicast or address.is_reserved or any(address in network for network in NOT_PUBLIC)
    return address.is_global and not special


def system_addresses(host: str) -> Sequence[str]:
    """All addresses of a host name, as this machine resolves it; raises OSError."""
    # The final dot keeps the resolver from trying the name inside this machine's own domains.
    found = socket.getaddrinfo(f"{host}.", 443, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """The way to the outside: who resolves names, which addresses are allowed, whom TLS trusts, the port of https."""

    resolve: Callable[[str], Sequence[str]] = system_addresses
    allows: Callable[[Address], bool] = is_public
    tls: ssl.SSLContext = field(default_factory=httpcore.default_ssl_context)
    port: int = 443

    def connections(self, seconds: float) -> httpcore.ConnectionPool:
        """Connections to https hosts, none of which waits past `seconds` from now.

        Using it raises httpcore's errors, NotPublic and UnknownHost among them.
        """
        return httpcore.ConnectionPool(ssl_context=self.tls, network_backend=_PinnedBackend(self, _Deadline(seconds)))


def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, or TimeoutError. For what cannot be given a limit itself; it runs on, in a thread."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result(seconds)


class _Deadline:
    """A moment that no wait goes past."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, at_most: float | None = None) -> float:
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise httpcore.ReadTimeout
        return seconds if at_most is None else min(seconds, at_most)


class _PinnedBackend(httpcore.NetworkBackend):
    """Connects to the very addresses that it has checked; TLS goes on to ask for the host's name."""

    def __init__(self, network: Network, deadline: _Deadline) -> None:
        self._network = network
        self._deadline = deadline

    def connect_tcp(self, host: str, *_: object, **__: object) -> httpcore.NetworkStream:
        addresses = self._addresses(host)
        failure: Exception = httpcore.ConnectError()
        for number, address in enumerate(addresses):
            share = self._deadline.left() / (len(addresses) - number)  # one silent address must not use up the time
            try:
                stream = httpcore.SyncBackend().connect_tcp(address, self._network.port, share)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return _PunctualStream(stream, self._deadline)
        raise failure

    def _addresses(self, host: str) -> Sequence[str]:
        try:
            found = within(self._deadline.left(), lambda: self._network.resolve(host))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout from error
        except OSError as error:
            raise UnknownHost from error
        if not all(self._network.allows(ip_address(address)) for address in found):
            raise NotPublic
        return found


class _PunctualStream(httpcore.NetworkStream):
    """A stream of which no wait goes past the deadline, however small the pieces that arrive."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left(timeout))
        return _PunctualStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)
