"""Path templates: what they match, what their variables get, and which of them is tried first."""

from __future__ import annotations

import pytest

from vmherd.gateway import path_template


@pytest.mark.parametrize(
    ("template", "path", "captured"),
    [
        ("/v1/instances", "/v1/instances", ()),
        ("/v1/instances", "/v1/instances/", None),
        ("/v1/instances", "/v1/instances2", None),
        ("/v1/instances", "/v1.instances", None),
        ("/v1.0/a", "/v1x0/a", None),
        ("/v1/instances/{name}", "/v1/instances/web", ("web",)),
        ("/v1/instances/{name}", "/v1/instances/", None),
        ("/v1/instances/{name}", "/v1/instances/a/b", None),
        ("/v1/instances/{name}", "/v1/instances/a%2Fb", ("a%2Fb",)),
        ("/v1/instances/{name}/start", "/v1/instances/web/start", ("web",)),
        ("/v1/instances:plan", "/v1/instances:plan", ()),
        ("/v1/{a.b}:stop", "/v1/x:y:stop", ("x:y",)),
        ("/v1/{name=zoos/*}", "/v1/zoos/a", ("zoos/a",)),
        ("/v1/{name=zoos/*}", "/v1/parks/a", None),
        ("/v1/{name=zoos/*/cages/*}/x/{other}", "/v1/zoos/a/cages/b/x/c", ("zoos/a/cages/b", "c")),
        ("/v1/{name=**}", "/v1/a/b/c", ("a/b/c",)),
        ("/v1/{name=**}:show", "/v1/a/b:show", ("a/b",)),
        ("/v1/{name=files/**}", "/v1/files/", ("files/",)),
        ("/v1/*/{name}", "/v1/any/web", ("web",)),
        ("/**", "/", ()),
    ],
)
def test_match(template: str, path: str, captured: tuple[str, ...] | None) -> None:
    assert path_template.parse(template).match(path) == captured


@pytest.mark.parametrize("text", ["/v1/{name", "/v1/{name}}", "/v1/***", "/v1/{}", "/v1/{a=}", "/v1/a:b:c", "/v1/a:"])
def test_what_is_no_template_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a path template"):
        path_template.parse(text)


@pytest.mark.parametrize(
    ("template", "raw", "value"),
    [
        ("/{name}", "a%2Fb", "a/b"),
        ("/{name}", "a%252Fb", "a%2Fb"),
        ("/{name}", "caf%C3%A9%20x+y", "café x+y"),
        ("/{name=*}", "a%2fb", "a/b"),
        ("/{name=**}", "a%2Fb/c%20d", "a%2Fb/c d"),
        ("/{name=zoos/*}", "zoos/a%2fb", "zoos/a%2fb"),
        ("/{name=**}", "a%252Fb", "a%2Fb"),
    ],
)
def test_values_are_decoded_once(template: str, raw: str, value: str) -> None:
    assert path_template.parse(template).variables[0].decode(raw) == value


@pytest.mark.parametrize("template", ["/{name}", "/{name=**}"])
def test_what_is_not_utf8_is_refused(template: str) -> None:
    with pytest.raises(UnicodeDecodeError):
        path_template.parse(template).variables[0].decode("%ff")


def test_the_more_special_template_comes_first() -> None:
    in_order = ["/v1/{name}:stop", "/v1/a/b", "/v1/a/{name}", "/v1/{name}", "/v1/{name}/b", "/v1/{name=a/**}"]
    templates = [path_template.parse(text) for text in reversed(in_order)]
    by_order = [template.text for template in sorted(templates, key=lambda it: it.order)]
    assert by_order.index("/v1/{name}:stop") == 0
    assert by_order.index("/v1/a/b") < by_order.index("/v1/a/{name}") < by_order.index("/v1/{name}/b")
    assert by_order.index("/v1/a/{name}") < by_order.index("/v1/{name=a/**}")


def test_openapi_has_no_patterns() -> None:
    assert path_template.parse("/v1/{name=zoos/*}/{other}:show").openapi == "/v1/{name}/{other}:show"
