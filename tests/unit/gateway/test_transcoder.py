"""HTTP requests as messages: path, query and body, each by itself and against each other."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from google.api.http_pb2 import HttpRule
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmherd.gateway import proto_json, transcoder
from vmherd.gateway.descriptors import Api, Method
from vmherd.gateway.transcoder import Binding
from vmherd.model.errors import InvalidArgument

PUT = "PUT /v1/zoos/{text}"
POST = "POST /v1/zoos"
SEARCH = "GET /v1/zoos"
FEED = "POST /v1/cages/{animal.name}:feed"
FIND = "LINK /v1/find/{name}"


@pytest.fixture
def ask(zoo: Api, zoo_bindings: dict[str, Binding]) -> Any:
    def ask(route: str, path: str = "", query: str = "", body: Any = None) -> dict[str, Any]:
        """The request that a route makes of path, query and body, as JSON."""
        binding = zoo_bindings[route]
        captured = binding.template.match(path or binding.template.text)
        assert captured is not None
        sent = b"" if body is None else json.dumps(body).encode()
        message = binding.request(zoo.pool, captured, query.encode(), sent)
        return MessageToDict(message, descriptor_pool=zoo.pool)

    return ask


def test_every_rule_is_a_binding(zoo_bindings: dict[str, Binding]) -> None:
    assert set(zoo_bindings) == {
        PUT,
        POST,
        SEARCH,
        FEED,
        FIND,
        "GET /v1/{name=zoos/*/cages/*}",
        "GET /v1/files/{name=**}",
        "GET /v1/files/{name=**}:show",
    }


@pytest.mark.parametrize(
    ("route", "path", "query", "body", "meant"),
    [
        (PUT, "/v1/zoos/a%2Fb%20c", "", {"count": 1}, {"text": "a/b c", "count": 1}),
        (PUT, "/v1/zoos/a", "", {"text": "a"}, {"text": "a"}),
        (PUT, "/v1/zoos/a", "", {"text": ""}, {"text": "a"}),
        (PUT, "/v1/zoos/a", "", None, {"text": "a"}),
        (POST, "", "", {}, {}),
        (SEARCH, "", "", None, {}),
        (SEARCH, "", "text=a%20b+c%26&count=7&flag=true", None, {"text": "a b c&", "count": 7, "flag": True}),
        (SEARCH, "", "small=-1&large=-9007199254740993", None, {"small": -1, "large": "-9007199254740993"}),
        (SEARCH, "", "text=&maybeText=", None, {"maybeText": ""}),
        (SEARCH, "", "texts=a&texts=b&texts=", None, {"texts": ["a", "b", ""]}),
        (SEARCH, "", "totals=1&totals=18446744073709551615", None, {"totals": ["1", "18446744073709551615"]}),
        (SEARCH, "", "food=GRASS&foods=1&foods=-5", None, {"food": "GRASS", "foods": ["GRASS", "MEAT"]}),
        (SEARCH, "", "smallSigned=1&small_fixed=2", None, {"smallSigned": 1, "smallFixed": 2}),
        (SEARCH, "", "quiteDifferent=a", None, {"quiteDifferent": "a"}),
        (SEARCH, "", "odd_name=a", None, {"quiteDifferent": "a"}),
        (
            SEARCH,
            "",
            "nested.innerText=a&nested.numbers=1&nested.numbers=2",
            None,
            {"nested": {"innerText": "a", "numbers": ["1", "2"]}},
        ),
        (SEARCH, "", "nested.inner_text=a", None, {"nested": {"innerText": "a"}}),
        (SEARCH, "", "elapsed=3.5s&laps=1s&laps=-0.25s", None, {"elapsed": "3.500s", "laps": ["1s", "-0.250s"]}),
        (
            SEARCH,
            "",
            "at=2030-01-31T12:00:00Z&mask=text,flag",
            None,
            {"at": "2030-01-31T12:00:00Z", "mask": "text,flag"},
        ),
        (
            SEARCH,
            "",
            "boxedFlag=false&boxedText=&boxed_count=3",
            None,
            {"boxedFlag": False, "boxedText": "", "boxedCount": 3},
        ),
        (
            SEARCH,
            "",
            "boxedRatio=NaN&exactRatio=-1.5e3&blob=-_8",
            None,
            {"boxedRatio": "NaN", "exactRatio": -1500.0, "blob": "+/8="},
        ),
        (SEARCH, "", "left=a", None, {"left": "a"}),
        (
            FEED,
            "/v1/cages/leo:feed",
            "food=MEAT&twice=true",
            {"legs": 4},
            {"animal": {"name": "leo", "legs": 4}, "food": "MEAT", "twice": True},
        ),
        (FEED, "/v1/cages/a:b:feed", "", None, {"animal": {"name": "a:b"}}),
        (
            FIND,
            "/v1/find/a",
            "like.name=b&unlike.food=1",
            None,
            {"name": "a", "like": {"name": "b"}, "unlike": {"food": "GRASS"}},
        ),
        ("GET /v1/{name=zoos/*/cages/*}", "/v1/zoos/a/cages/b%2Fc", "", None, {"name": "zoos/a/cages/b%2Fc"}),
        ("GET /v1/files/{name=**}", "/v1/files/a/b%20c", "", None, {"name": "a/b c"}),
    ],
)
def test_taken(ask: Any, route: str, path: str, query: str, body: Any, meant: dict[str, Any]) -> None:
    assert ask(route, path, query, body) == meant


@pytest.mark.parametrize(
    ("route", "path", "query", "body", "message"),
    [
        (PUT, "/v1/zoos/a", "", {"text": "b"}, 'text: the path says "a" and the body "b"'),
        (PUT, "/v1/zoos/a", "text=a", {}, "text: there is no such query parameter; this method has none"),
        (PUT, "/v1/zoos/%ff", "", {}, "text: it is not UTF-8"),
        (POST, "", "count=1", {}, "count: there is no such query parameter; this method has none"),
        (POST, "", "", [], "body: expected an object, got []"),
        (SEARCH, "", "", {"text": "a"}, "this method takes no body"),
        (SEARCH, "", "labels=a", None, "labels: there is no such query parameter; "),
        (SEARCH, "", "labels[a]=b", None, "labels[a]: there is no such query parameter; "),
        (SEARCH, "", "nested=a", None, "nested: there is no such query parameter; "),
        (SEARCH, "", "nests.innerText=a", None, "nests.innerText: there is no such query parameter; "),
        (SEARCH, "", "free=a", None, "free: there is no such query parameter; "),
        (SEARCH, "", "=a", None, ": there is no such query parameter; "),
        (SEARCH, "", "text=a&text=b", None, "text: it is given more than once"),
        (SEARCH, "", "boxedText=a&boxed_text=b", None, "boxed_text: it is given more than once"),
        (SEARCH, "", "count=", None, 'count: expected a whole number, got ""'),
        (SEARCH, "", "count=-1", None, 'count: expected a whole number from 0 to 4294967295, got "-1"'),
        (SEARCH, "", "flag=yes", None, 'flag: expected true or false, got "yes"'),
        (SEARCH, "", "flag", None, 'flag: expected true or false, got ""'),
        (SEARCH, "", "food=9", None, "food: expected one of FOOD_UNSPECIFIED, GRASS, MEAT, got 9"),
        (
            SEARCH,
            "",
            "foods=GRASS&foods=HAY",
            None,
            'foods[1]: expected one of FOOD_UNSPECIFIED, GRASS, MEAT, got "HAY"',
        ),
        (SEARCH, "", "elapsed=3", None, 'elapsed: expected a duration in seconds such as "3.5s", got "3"'),
        (SEARCH, "", "boxedCount=x", None, 'boxed_count: expected a whole number, got "x"'),
        (SEARCH, "", "left=a&right=1", None, "right: it, or another field that excludes it, is given already"),
        (SEARCH, "", "text=%ff", None, "the query is not UTF-8, percent-encoded"),
        (FEED, "/v1/cages/leo:feed", "", {"name": "tom"}, 'animal.name: the path says "leo" and the body "tom"'),
        (
            FEED,
            "/v1/cages/leo:feed",
            "animal.legs=4",
            {},
            "animal.legs: there is no such query parameter; this method has food, twice",
        ),
        (FEED, "/v1/cages/leo:feed", "", [], "animal: expected an object, got []"),
        (
            FEED,
            "/v1/cages/leo:feed",
            "",
            {"legs": -1},
            "animal.legs: expected a whole number from 0 to 4294967295, got -1",
        ),
        (FIND, "/v1/find/a", "like.child.name=b", None, "like.child.name: there is no such query parameter; "),
    ],
)
def test_refused(ask: Any, route: str, path: str, query: str, body: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ask(route, path, query, body)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (HttpRule(get="/v1/{nothing}"), "a path cannot give nothing"),
        (HttpRule(get="/v1/{texts}"), "a path cannot give texts"),
        (HttpRule(get="/v1/{nested}"), "a path cannot give nested"),
        (HttpRule(get="/v1/{boxed_text}"), "a path cannot give boxed_text"),
        (HttpRule(post="/v1", body="nothing"), "has no field nothing"),
        (HttpRule(get="/v1", response_body="text"), "response_body"),
        (HttpRule(get="/v1/{"), "not a path template"),
    ],
)
def test_a_wrong_annotation_is_found_at_the_start(zoo: Api, rule: HttpRule, why: str) -> None:
    wrong = Method(zoo.methods[0].descriptor, (rule,))
    with pytest.raises(ValueError, match=why):
        transcoder.bindings(Api(zoo.pool, (wrong,), {}))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NESTED = st.fixed_dictionaries(
    {}, optional={"innerText": NAMES, "numbers": st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=2)}
)
DURATIONS = st.builds("{}{}.{:03}s".format, st.sampled_from(["", "-"]), st.integers(0, 10**11), st.integers(0, 999))
BLOBS = st.binary(max_size=4).map(lambda blob: base64.b64encode(blob).decode())
IN_URLS: dict[str, st.SearchStrategy[Any]] = {
    "blob": BLOBS,
    "flag": st.booleans(),
    "small": st.integers(-(2**31), 2**31 - 1),
    "count": st.integers(0, 2**32 - 1),
    "large": st.integers(-(2**63), 2**63 - 1),
    "totalFixed": st.integers(0, 2**64 - 1),
    "exactRatio": st.floats(allow_nan=False, allow_infinity=False) | st.just("-Infinity"),
    "ratio": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "food": st.sampled_from(["GRASS", "MEAT", 1, -5]),
    "maybeText": NAMES,
    "nested": NESTED,
    "texts": st.lists(NAMES, min_size=1, max_size=3),
    "flags": st.lists(st.booleans(), min_size=1, max_size=3),
    "right": st.integers(0, 9),
    "elapsed": DURATIONS,
    "boxedFlag": st.booleans(),
    "boxedBlob": BLOBS,
    "quiteDifferent": NAMES,
}
IN_BODIES = IN_URLS | {
    "labels": st.dictionaries(NAMES, NAMES, max_size=3),
    "nestsByNumber": st.dictionaries(st.integers(-9, 9).map(str), NESTED, max_size=2),
    "nests": st.lists(NESTED, max_size=2),
    "laps": st.lists(DURATIONS, max_size=2),
    "free": st.dictionaries(NAMES, NAMES | st.booleans() | st.none(), max_size=2),
}


def message_of(zoo: Api, value: dict[str, Any]) -> Message:
    """The message that protobuf's own reader makes of JSON."""
    message = GetMessageClass(zoo.pool.FindMessageTypeByName("vmherd.test.zoo.Everything"))()
    return ParseDict(value, message, descriptor_pool=zoo.pool)


def as_query(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name, item in value.items():
        if isinstance(item, dict):
            pairs += as_query(item, f"{prefix}{name}.")
        else:
            items = item if isinstance(item, list) else [item]
            pairs += [(prefix + name, it if isinstance(it, str) else json.dumps(it)) for it in items]
    return pairs


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(name=NAMES.filter(bool), value=st.fixed_dictionaries({}, optional=IN_BODIES))
def test_path_and_body_carry_any_message(
    zoo: Api, zoo_bindings: dict[str, Binding], name: str, value: dict[str, Any]
) -> None:
    binding = zoo_bindings[PUT]
    captured = binding.template.match(f"/v1/zoos/{quote(name, safe='')}")
    assert captured is not None
    got = binding.request(zoo.pool, captured, b"", json.dumps(value).encode())
    assert got == message_of(zoo, {**value, "text": name})


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(value=st.fixed_dictionaries({}, optional=IN_URLS))
def test_a_query_carries_any_message_of_scalars(
    zoo: Api, zoo_bindings: dict[str, Binding], value: dict[str, Any]
) -> None:
    query = urlencode(as_query(value)).encode()
    got = zoo_bindings[SEARCH].request(zoo.pool, (), query, b"")
    if not value.get("nested", True):
        value = {
            name: item for name, item in value.items() if name != "nested"
        }  # an empty message has no fields to name
    assert got == message_of(zoo, value)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(value=st.fixed_dictionaries({}, optional=IN_BODIES))
def test_json_out_is_json_in(zoo: Api, value: dict[str, Any]) -> None:
    message = message_of(zoo, value)
    back = type(message)()
    proto_json.read(proto_json.load(proto_json.to_json(message, zoo.pool).encode()), back, zoo.pool)
    assert back == message


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    query=st.binary(max_size=64)
    | st.lists(st.tuples(st.sampled_from([*IN_BODIES]), NAMES)).map(urlencode).map(str.encode),
    body=st.binary(max_size=64)
    | st.dictionaries(
        st.sampled_from([*IN_BODIES, "any", "anyValue", "anyList", "mask", "at"]) | NAMES,
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | NAMES,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
        ),
    ).map(lambda value: json.dumps(value).encode()),
)
def test_whatever_comes_is_taken_or_refused(
    zoo: Api, zoo_bindings: dict[str, Binding], query: bytes, body: bytes
) -> None:
    for route, sent in ((POST, (b"", body)), (SEARCH, (query, b""))):
        with contextlib.suppress(InvalidArgument):
            zoo_bindings[route].request(zoo.pool, (), *sent).SerializeToString()
