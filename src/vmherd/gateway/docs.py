"""The page that shows the API: Swagger UI from its Python package, so that it works with no internet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from swagger_ui_bundle import swagger_ui_path

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>vmherd API</title>
<link rel="icon" href="/docs/favicon-32x32.png">
<link rel="stylesheet" href="/docs/swagger-ui.css">
<body>
<div id="page"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
"""

_START = """\
// This Swagger UI refuses OpenAPI 3.1 by its number, and can draw what this API uses of it.
fetch("/openapi.json")
  .then((answer) => answer.json())
  .then((spec) => {
    SwaggerUIBundle({ spec: { ...spec, openapi: "3.0.3" }, dom_id: "#page", deepLinking: true, validatorUrl: null });
  });
"""

Endpoint = Callable[[Request], Awaitable[Response]]


def _text(text: str, media_type: str) -> Endpoint:
    async def answer(_request: Request) -> Response:
        return Response(text, media_type=media_type, headers=_HEADERS)

    return answer


def _file(name: str) -> Endpoint:
    async def answer(_request: Request) -> Response:
        return FileResponse(swagger_ui_path / name, headers=_HEADERS)

    return answer


ENDPOINTS: dict[str, Endpoint] = {
    "/docs": _text(_PAGE, "text/html"),
    "/docs/start.js": _text(_START, "text/javascript"),
    **{f"/docs/{name}": _file(name) for name in ("favicon-32x32.png", "swagger-ui.css", "swagger-ui-bundle.js")},
}
"""What answers at each path of the page."""
