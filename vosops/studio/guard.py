"""Who may talk to the server: a page that has the token, opened from this machine, and nobody else.

The server listens on 127.0.0.1, which other users of the machine and every page in the browser can reach too. Hence:

- everything but the page's own files needs the random token of the URL, in a header or, where a browser sends none
  (pictures, downloads, the websocket), as ``?token=``. It is in no cookie, so no other site can make a browser send it;
- ``Host`` must be this server's, or a name that somebody pointed at 127.0.0.1 could read the page (DNS rebinding);
- a request that a browser says comes from another site (``Origin``, ``Sec-Fetch-Site``) is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard"]

TOKEN_HEADER = b"x-vosops-token"
_OWN_SITE = (b"same-origin", b"none")
_HEADERS = [
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'self'; connect-src 'self' ws://127.0.0.1:* ws://localhost:*; "
        b"img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; "
        b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
]


class Guard:
    """ASGI middleware that lets through what :mod:`vosops.studio.guard` says, and adds headers that keep pages apart.

    Args:
        app: The application.
        token: What a request must have.
        hosts: Values of ``Host`` that are this server's, such as "127.0.0.1:8000".
        open_paths: Begins of paths that need no token: the page's files, which hold nothing of the user's.
    """

    def __init__(
        self, app: ASGIApp, *, token: str, hosts: Collection[str], open_paths: Collection[str]
    ) -> None:
        self.app = app
        self.token = token.encode()
        self.hosts = {host.encode() for host in hosts}
        self.open_paths = tuple(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refused = self._refuse(scope)
        if refused is None:
            await self.app(scope, receive, self._with_headers(send))
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 4403, "reason": refused[1]})
        else:
            body = refused[1].encode()
            headers = [
                (b"content-type", b"text/plain"),
                (b"content-length", str(len(body)).encode()),
                *_HEADERS,
            ]
            await send({"type": "http.response.start", "status": refused[0], "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _refuse(self, scope: Scope) -> tuple[int, str] | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if headers.get(b"host") not in self.hosts:
            return 403, "this server answers to its own address only"
        origin = headers.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] not in self.hosts:
            return 403, "requests of other sites are refused"
        site = headers.get(b"sec-fetch-site")
        opens_page = headers.get(b"sec-fetch-mode") == b"navigate" and scope.get("method") == "GET"
        if site is not None and site not in _OWN_SITE and not opens_page:
            return 403, "requests of other sites are refused"
        path: str = scope["path"]
        if path == "/" or path.startswith(self.open_paths):
            return None
        given = headers.get(TOKEN_HEADER)
        if given is None:
            values = parse_qs(scope.get("query_string", b""), max_num_fields=20).get(b"token", [b""])
            given = values[0]
        if not secrets.compare_digest(given, self.token):
            return 401, "the token is missing or wrong: open the URL that vosops studio printed"
        return None

    def _with_headers(self, send: Send) -> Send:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message.get("headers", [])}
                added = [entry for entry in _HEADERS if entry[0] not in present]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        return send_with_headers
