"""Who may talk to the service (plain ASGI).

A browser on this machine reaches loopback too, on behalf of any page that it shows. A page elsewhere can send
simple requests without asking, or let its own name resolve to 127.0.0.1 (DNS rebinding). So the name in Host must
be ours, a changing request must carry a content type that browsers send only after asking, and its Origin must be
our own. Another address than loopback needs a bearer token besides.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.settings import Settings, is_loopback

MOST_BODY_BYTES = 1_048_576
_READING = frozenset({"GET", "HEAD", "OPTIONS"})

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),  # configs, logs and figures are for who asked, not for caches
)
"""Of every answer, unless its route says otherwise."""


class Refusal(Exception):  # noqa: N818  not an error of ours but an answer
    """A request that is answered with a refusal."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class Guard:
    """Lets through what ``settings`` allow, and answers the rest itself."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        """Stand before ``app``."""
        self._app = app
        self._token = settings.token
        self._names = {"localhost", settings.host.lower(), *settings.allowed_hosts}
        self._open = not is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        guarded = _with_headers(send)
        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
            await self._app(scope, _limited(receive), guarded)
        except Refusal as refusal:
            await _answer(guarded, refusal)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise Refusal(421, f"Host {host!r}: not a name of this service; add it to CROSSLANE_ALLOWED_HOSTS")
        if path != "/healthz" and self._token is not None and not self._knows_token(headers):
            raise Refusal(401, "this service needs its token: send 'Authorization: Bearer TOKEN'")
        if method in _READING:
            return
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise Refusal(403, f"Origin {origin!r}: pages of other origins may not change anything here")
        if headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
            raise Refusal(403, "pages of other origins may not change anything here")
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise Refusal(415, f"Content-Type {content_type!r}: must be 'application/json'")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MOST_BODY_BYTES:
            raise Refusal(413, f"body: larger than {MOST_BODY_BYTES:,} bytes")

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        if not name:
            return False
        if name in self._names or is_loopback(name):
            return True
        # Rebinding needs a name; a bare address on an open port is as good as the token that goes with it.
        return self._open and _is_address(name)

    def _knows_token(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        expected = (self._token or "").encode()
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), expected)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_headers(send: Send) -> Send:
    """``send`` that adds what every answer carries."""

    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = list(message.get("headers", ()))
            names = {name.lower() for name, _ in given}
            message = {**message, "headers": [*given, *(pair for pair in _HEADERS if pair[0] not in names)]}
        await send(message)

    return guarded


def _limited(receive: Receive) -> Receive:
    """``receive`` that refuses a body which is longer than it said."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MOST_BODY_BYTES:
            # The framework takes any other class for a broken connection.
            raise HTTPException(413, f"body: larger than {MOST_BODY_BYTES:,} bytes")
        return message

    return limited


async def _answer(send: Send, refusal: Refusal) -> None:
    body = json.dumps({"detail": refusal.detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
