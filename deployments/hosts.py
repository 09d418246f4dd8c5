"""For which names a service without API keys answers: this machine's own.

Any page in a browser on this machine can send requests to 127.0.0.1, and through a name that its owner turns to that
address (DNS rebinding) read the answers. Both show in headers that no page can choose: Host and Origin.
"""

import ipaddress
import re
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.errors import HostRefused, PipelineError

OPEN = "/healthz"  # asked by name or address of whoever watches, and tells nothing
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/@]+))(?::[0-9]{0,5})?", re.IGNORECASE)
ORIGIN = re.compile(f"https?://{HOST.pattern}", re.IGNORECASE)
REFUSED = (
    "Without API keys only this machine's own programs are answered; call this address as 127.0.0.1 or localhost, and "
    "not from the page of another host."
)


def is_loopback(host: str) -> bool:
    """Whether a host, without a port, is this machine and can be no other."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class OwnHost:
    """ASGI middleware: lets in who calls this machine by its own name, and no page of another host."""

    def __init__(self, app: ASGIApp, refusal: Callable[[Scope, PipelineError], Response]) -> None:
        """`refusal` makes the answer to the others."""
        self._app, self._refusal = app, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI protocol."""
        if scope["type"] not in ("http", "websocket") or _open(scope) or _own(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._refusal(scope, HostRefused(REFUSED))(scope, receive, send)


def _open(scope: Scope) -> bool:
    return bool(scope["path"].removeprefix(scope.get("root_path", "")) == OPEN)


def _own(scope: Scope) -> bool:
    hosts = [HOST.fullmatch(value.decode("latin-1")) for name, value in scope["headers"] if name == b"host"]
    pages = [ORIGIN.fullmatch(value.decode("latin-1")) for name, value in scope["headers"] if name == b"origin"]
    return len(hosts) == 1 and all(found is not None and is_loopback(found[1] or found[2]) for found in hosts + pages)
