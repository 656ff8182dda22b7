"""The page that shows the API: everything it needs comes from the gateway itself."""

from __future__ import annotations

import re

import httpx
import pytest

pytestmark = pytest.mark.anyio


async def test_the_page_refers_to_nothing_outside(http: httpx.AsyncClient) -> None:
    page = await http.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    start = (await http.get("/docs/start.js")).text
    assert "://" not in page.text + start
    references = re.findall(r'(?:href|src)="([^"]+)"', page.text) + re.findall(r'fetch\("([^"]+)"\)', start)
    assert len(references) == 5
    for reference in references:
        assert re.match(r"/\w", reference)
        assert (await http.get(reference)).status_code == 200


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/docs", "text/html"),
        ("/docs/start.js", "text/javascript"),
        ("/docs/swagger-ui-bundle.js", "text/javascript"),
        ("/docs/swagger-ui.css", "text/css"),
        ("/docs/favicon-32x32.png", "image/png"),
    ],
)
async def test_the_page_may_talk_to_nobody_else(http: httpx.AsyncClient, path: str, media_type: str) -> None:
    response = await http.get(path)
    assert response.headers["content-type"].startswith(media_type)
    policy = dict(part.strip().partition(" ")[::2] for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == policy["script-src"] == "'self'"
    assert not re.search(r"://|\*", response.headers["content-security-policy"])
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_only_what_the_page_needs_is_served(http: httpx.AsyncClient) -> None:
    for name in ("index.html", "swagger-ui-bundle.js.map", "../__init__.py", "%2e%2e/__init__.py", ""):
        assert (await http.get(f"/docs/{name}")).status_code == 404


async def test_the_description(http: httpx.AsyncClient) -> None:
    response = await http.get("/openapi.json")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    description = response.json()
    assert description["openapi"].startswith("3.1.")
    assert "/v1/instances/{name}" in description["paths"]
    assert description["security"] == []
