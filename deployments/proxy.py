"""What Ray Serve's HTTP proxy lets in: at which address, and with which headers.

The proxy obeys headers of the client: one switches off the server's time limit, one the stopping of work whose caller
has left, one names a model to load, one the id under which a request is logged. None of them is the client's to say.
"""

import ray
from ray.serve.context import _get_global_client  # Ray has no public way to the HTTP options
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

# As Serve compares them: in small letters, and with - for _ where a gateway has changed it.
STRIPPED = {
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"x-request-id",
    b"x-session-id",
    b"serve-multiplexed-model-id",
}


class StripHeaders:
    """ASGI middleware: the request without the headers that Serve itself would obey."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI protocol."""
        if "headers" in scope:
            kept = [pair for pair in scope["headers"] if pair[0].lower().replace(b"_", b"-") not in STRIPPED]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.proxy:middlewares makes Serve put around its proxy."""
    return [Middleware(StripHeaders)]


def http_host() -> str:
    """The address that Serve listens on for HTTP, asked from within a replica; 127.0.0.1 where it does not listen."""
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    return (client.http_config.host if client else None) or "127.0.0.1"
