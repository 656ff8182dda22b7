"""Who may ask the gateway for anything: the right host, the right origin, the right token."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vmherd.gateway.errors import error_response
from vmherd.model.errors import PermissionDenied, Unauthenticated, VmherdError
from vmherd.rpc.status import to_status


class Admission:
    """ASGI middleware that refuses what must not reach the routes.

    A web page of another site reaches a local port in two ways: under a name of its own that it lets resolve to this
    host (https://en.wikipedia.org/wiki/DNS_rebinding), which the Host header shows, and by sending requests across
    origins, which the Origin header shows.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], token: str | None, public: Collection[str]) -> None:
        """Takes the names beside the loopback's, the token, None for none, and the paths that need no token."""
        self._app = app
        self._hosts = frozenset(_host_of(host) for host in hosts) - {""}
        self._token = None if token is None else token.encode()
        self._public = frozenset(path.encode() for path in public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with an error, or lets the request through."""
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope), scope["raw_path"])
            except VmherdError as error:
                await error_response(to_status(error))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers, raw_path: bytes) -> None:
        authority = headers.get("host", "").lower()
        if not self._is_here(_host_of(authority)):
            raise PermissionDenied(
                f"the host {authority[:255]!r} is not one of this gateway's; add it to `allowed_hosts` in its settings",
                reason="HOST_NOT_ALLOWED",
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != authority:
            raise PermissionDenied(
                f"pages of the origin {origin[:255]!r} may not ask this gateway", reason="ORIGIN_NOT_ALLOWED"
            )
        if self._token is not None and raw_path not in self._public and not self._shows_token(headers):
            raise Unauthenticated(
                "this needs the header `Authorization: Bearer TOKEN`; the token is in the gateway's `token_file`",
                reason="TOKEN_NEEDED",
            )

    def _is_here(self, host: str) -> bool:
        try:
            return host in self._hosts or host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def _shows_token(self, headers: Headers) -> bool:
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        fits = hmac.compare_digest(shown.strip().encode("latin-1"), self._token or b"")
        return fits and scheme.lower() == "bearer"


def _host_of(authority: str) -> str:
    """The host of `HOST` or `HOST:PORT`; empty where it is neither."""
    try:
        return (urlsplit(f"//{authority}").hostname or "").removesuffix(".")
    except ValueError:
        return ""
