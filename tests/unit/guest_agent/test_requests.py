"""What is a request, whatever pieces it comes in. That the errors are the agent's is tested against the agent."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmherd.guest_agent.requests import Refusal, Request, RequestDecoder, RequestOutOfBounds

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
).filter(lambda value: "inf" not in repr(value))
REQUESTS = st.builds(
    Request, st.text(), st.dictionaries(st.text(), VALUES, max_size=3), VALUES.map(lambda value: {"id": value})
)
MARKS = [bytes([byte]) for byte in b"{}[]:,\"'\\\n @\x00\xff"]
WORDS = [b"true", b"nul", b"-1", b"1.", b"5e3", b"\xc3\xa9", b'"execute"', b'"id"', b'"\\u00e9"', b'{"execute":"x"}']
SCRAPS = st.lists(st.sampled_from([*MARKS, *WORDS]), max_size=30).map(b"".join)


def decoded(data: bytes, cuts: list[int]) -> list[Request | Refusal]:
    decoder = RequestDecoder()
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [found for start, end in pairwise(edges) for found in decoder.feed(data[start:end])]


@given(st.lists(REQUESTS, max_size=4), st.booleans(), st.sampled_from(["", "\n", " \r\n\t"]), st.lists(st.integers(0)))
def test_requests_come_out_as_they_went_in(
    requests: list[Request], ascii_only: bool, between: str, cuts: list[int]
) -> None:
    text = between.join(
        json.dumps(
            {"execute": request.command, "arguments": request.arguments, **request.echo}, ensure_ascii=ascii_only
        )
        for request in requests
    )
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half a character, which only an escape sequence can spell
        data = text.encode("ascii", "backslashreplace")
    assert decoded(data, cuts) == requests


@given(SCRAPS, st.lists(st.integers(0)))
def test_pieces_make_no_difference(data: bytes, cuts: list[int]) -> None:
    assert decoded(data, cuts) == decoded(data, [])


@given(SCRAPS)
def test_a_request_is_found_after_anything(data: bytes) -> None:
    assert decoded(data + b'\xff{"execute": "guest-ping", "id": 1}', [])[-1] == Request("guest-ping", {}, {"id": 1})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (rb"""'it\'s "so"'""", 'it\'s "so"'),
        (rb'''"it\'s \"so\""''', 'it\'s "so"'),
        (rb"""'\\'""", "\\"),
        (rb"""'\u00e9\n'""", "é\n"),
        (b"-0.5e-3", -0.0005),
        (b"18446744073709551616", 1 << 64),
    ],
)
def test_values_are_spelled_in_the_agents_ways_too(text: bytes, value: Any) -> None:
    assert decoded(b'{"execute": "x", "id": %b}' % text, []) == [Request("x", {}, {"id": value})]


@pytest.mark.parametrize("data", [b"1e999", b"[" * 20 + b"1" * 5000 + b"]" * 20, b'{"a":{"b":1,"b":1}}', b'"\xc3("'])
def test_a_value_that_cannot_be_passed_on_is_refused(data: bytes) -> None:
    found = decoded(data + b"\n", [])
    assert isinstance(found[0], Refusal)
    assert "JSON parse error" in found[0].desc


def test_shown_text_is_short() -> None:
    for data in (b'{"%b": 1}' % (b"x" * 10_000), b"@" * 10_000, b"1" * 10_000 + b"\n", b'"' + b"x" * 10_000 + b"\x00"):
        for found in decoded(data, []):
            assert isinstance(found, Refusal)
            assert len(found.desc) < 200


def test_bounds_count_what_is_kept_and_not_what_is_sent() -> None:
    decoder = RequestDecoder(max_request_bytes=100)
    request = b'{"execute": "guest-ping"}'
    assert len(list(decoder.feed((request + b" " * 200) * 50))) == 50
    with pytest.raises(RequestOutOfBounds, match="size"):
        list(decoder.feed(b'{"execute": "' + b"x" * 101))
