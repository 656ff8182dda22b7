"""The order of the routes, which decides where two templates match one path."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.routing import Match

from vmherd.gateway.app import create_app
from vmherd.gateway.descriptors import Api
from vmherd.gateway.routes import Closing
from vmherd.gateway.upstream import Upstream

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("method", "path", "captured"),
    [
        ("GET", "/v1/files/a/b", ("a/b",)),
        ("GET", "/v1/files/a/b:show", ("a/b",)),  # the template without the verb comes first in the proto
        ("GET", "/v1/zoos/a%2Fb/cages/c", ("zoos/a%2Fb/cages/c",)),
        ("POST", "/v1/cages/a:feed", ("a",)),
        ("LINK", "/v1/find/a", ("a",)),
    ],
)
async def test_the_more_special_route_answers(zoo: Api, method: str, path: str, captured: tuple[str, ...]) -> None:
    upstream = Upstream(Path("/no/such/socket"))
    try:
        app = create_app(zoo, upstream, Closing(), hosts=[], token=None)
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": []}
        matches = (route.matches(scope) for route in app.router.routes)
        _, found = next(it for it in matches if it[0] is Match.FULL)
    finally:
        await upstream.close()
    assert found["captured"] == captured
