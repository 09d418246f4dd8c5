"""Addresses of this service, whole, for APIs whose clients expect them so."""

from starlette.requests import Request


def base_url(http: Request) -> str:
    """Where this service is, by the name that the caller used for it; without a slash at its end."""
    base = http.base_url
    scheme = http.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    if scheme in ("http", "https"):  # a gateway has ended TLS; whoever lies here is told a wrong address, nobody else
        base = base.replace(scheme=scheme)
    return str(base).rstrip("/")
