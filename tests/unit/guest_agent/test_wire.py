from __future__ import annotations

import contextlib
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmherd.guest_agent.wire import (
    DELIMITER,
    MAX_DEPTH,
    MAX_ERROR_CHARS,
    MAX_REQUEST_BYTES,
    MAX_VALUES,
    Failure,
    MalformedReply,
    Success,
    encode_request,
    encode_sync,
    max_reply_bytes,
    member,
    optional,
    parse_reply,
)

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | INT64 | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def _reply(text: str) -> bytes:
    return f'{{"return": {text}, "id": 1}}'.encode()


@given(TEXT, st.dictionaries(TEXT, VALUES), INT64)
def test_a_request_is_one_line_of_json(command: str, arguments: dict[str, object], request_id: int) -> None:
    line = encode_request(command, arguments, request_id)
    assert line.index(b"\n") == len(line) - 1
    assert DELIMITER not in line
    message = json.loads(line)
    assert message.pop("arguments", {}) == arguments
    assert message == {"execute": command, "id": request_id}


@given(INT64)
def test_a_sync_carries_its_token_twice(token: int) -> None:
    line = encode_sync(token)
    assert line.startswith(DELIMITER)
    message = json.loads(line.removeprefix(DELIMITER))
    assert message == {"execute": "guest-sync-delimited", "arguments": {"id": token}, "id": token}


@pytest.mark.parametrize(
    "argument", [float("nan"), float("inf"), "\ud800", b"bytes", object(), "x" * MAX_REQUEST_BYTES]
)
def test_arguments_that_the_agent_cannot_take(argument: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        encode_request("guest-ping", {"argument": argument}, 1)


@given(VALUES, INT64)
def test_a_success_comes_back_whole(value: object, reply_id: int) -> None:
    line = json.dumps({"return": value, "id": reply_id}).encode()
    assert parse_reply(line) == parse_reply(DELIMITER + line) == Success(reply_id, value)


@given(TEXT, TEXT, INT64)
def test_a_failure_comes_back_whole(error_class: str, desc: str, reply_id: int) -> None:
    line = json.dumps({"id": reply_id, "error": {"class": error_class, "desc": desc}}).encode()
    assert parse_reply(line) == Failure(reply_id, error_class, desc)


@given(st.binary())
def test_any_bytes_give_a_reply_or_a_clean_error(line: bytes) -> None:
    with contextlib.suppress(MalformedReply):
        parse_reply(line)


def test_a_failure_without_an_id() -> None:
    line = b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}'
    assert parse_reply(line) == Failure(None, "GenericError", "JSON parse error")


def test_a_long_error_text_is_cut() -> None:
    line = json.dumps({"error": {"class": "c" * 10_000, "desc": "d" * 10_000}}).encode()
    assert parse_reply(line) == Failure(None, "c" * MAX_ERROR_CHARS, "d" * MAX_ERROR_CHARS)


@pytest.mark.parametrize("number", [-(1 << 63), (1 << 63) - 1, (1 << 64) - 1, (1 << 53) + 1])
def test_integers_are_exact(number: int) -> None:
    assert parse_reply(_reply(str(number))) == Success(1, number)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"", "not JSON"),
        (b"hello", "not JSON"),
        (b'{"return": {}, "id": 1', "not JSON"),
        (b'{"return": {}} {}', "not JSON"),
        (b"\xc3\x28", "not JSON"),
        ('{"return": {}}'.encode("utf-16"), "not JSON"),
        (b"[]", "a list where an object belongs"),
        (b"7", "an integer where an object belongs"),
        (b"{}", "either 'return' or an 'error'"),
        (b'{"id": 1}', "either 'return' or an 'error'"),
        (b'{"return": {}, "error": {"class": "c", "desc": "d"}}', "either 'return' or an 'error'"),
        (b'{"error": "bad"}', "either 'return' or an 'error'"),
        (b'{"error": {"class": "c"}}', "either 'return' or an 'error'"),
        (b'{"error": {"class": 1, "desc": "d"}}', "either 'return' or an 'error'"),
        (b'{"return": {}, "id": "1"}', "'id' is a text, not an integer"),
        (b'{"return": {}, "id": 1.0}', "'id' is a number, not an integer"),
        (b'{"return": {}, "id": true}', "'id' is a boolean, not an integer"),
        (_reply("NaN"), "NaN is not JSON"),
        (_reply("-Infinity"), "-Infinity is not JSON"),
        (_reply("1e999"), "out of range"),
        (_reply(str(1 << 64)), "more than 64 bits"),
        (_reply(str(-(1 << 63) - 1)), "more than 64 bits"),
        (_reply("9" * 100_000), "more than 64 bits"),
        (_reply('"\\ud800"'), "surrogates"),
        (_reply('{"\\uDFFF": 1}'), "surrogates"),
        (_reply("[" * 100_000), "deep"),
        (_reply("[" * 100_000 + "]" * 100_000), "deep"),
        (_reply('{"a":' * 500 + "1" + "}" * 500), "deep"),
        (_reply("[" * MAX_DEPTH + "]" * MAX_DEPTH), "deep"),
        (_reply("[" + "[]," * MAX_VALUES + "[]]"), "values"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_what_is_no_reply(line: bytes, complaint: str) -> None:
    with pytest.raises(MalformedReply, match=complaint) as caught:
        parse_reply(line)
    assert len(str(caught.value)) < 300


def test_a_nesting_bomb_gives_a_clean_error_with_little_stack_left() -> None:
    def descend(levels: int) -> None:
        if levels:
            descend(levels - 1)
        else:
            with pytest.raises(MalformedReply, match="deep"):
                parse_reply(_reply("[" * 100_000))

    descend(sys.getrecursionlimit() // 2)


def test_the_deepest_reply_that_is_taken() -> None:
    depth = MAX_DEPTH - 2  # the reply itself and the innermost value count too
    value = json.loads("[" * depth + "1" + "]" * depth)
    assert parse_reply(_reply(json.dumps(value))) == Success(1, value)


def test_whole_characters_beyond_the_first_plane_are_taken() -> None:
    assert parse_reply(_reply('"\\ud83d\\ude00"')) == Success(1, "😀")


def test_the_bounds_of_a_reply_depend_on_the_command() -> None:
    plain = max_reply_bytes("guest-ping", None)
    assert plain == max_reply_bytes("guest-file-read", {"handle": 1}) == max_reply_bytes("other", {"count": 1 << 30})
    assert max_reply_bytes("guest-file-read", {"handle": 1, "count": "x"}) == plain
    assert max_reply_bytes("guest-file-read", {"handle": 1, "count": -1}) == plain
    assert max_reply_bytes("guest-file-read", {"count": 3 << 20}) == plain + (4 << 20)
    assert max_reply_bytes("guest-file-read", {"count": 32 << 20}) < 50_000_000
    assert plain + 44_000_000 < max_reply_bytes("guest-exec-status", {"pid": 1}) < 50_000_000
    with pytest.raises(ValueError, match="'count' is 33554433"):
        max_reply_bytes("guest-file-read", {"count": (32 << 20) + 1})


LONG_TEXTS = st.integers(0, 3).map(lambda quarters: "QUJD" * (quarters << 12)) | TEXT


@given(st.lists(LONG_TEXTS, max_size=6), st.booleans())
def test_long_texts_come_back_whole(texts: list[str], escaped: bool) -> None:
    value = {"texts": texts, "number": 0.5, "by name": {text[:10]: text for text in texts}}
    line = json.dumps({"return": value, "id": 1}, ensure_ascii=escaped).encode()
    assert parse_reply(bytearray(line)) == Success(1, value)


LONG = b"x" * 100_000


@pytest.mark.parametrize(
    "line",
    [
        b'{"return": "a"' + LONG + b'"b", "id": 1}',
        b'{"return": {' + LONG + b'"b": 1}, "id": 1}',
        b'{"return": "' + LONG + b', "id": 1}',
        b'{"return": {"' + LONG + b'": 1}, "id": 1}',
        b'{"return": "' + LONG + b'" "' + LONG + b'", "id": 1}',
        b'{"return": "' + LONG + b"\xc3" + LONG + b'", "id": 1}',
    ],
    ids=range(6),
)
def test_a_line_with_a_long_text_that_is_no_reply(line: bytes) -> None:
    with pytest.raises(MalformedReply, match="not JSON"):
        parse_reply(line)


@pytest.mark.parametrize(
    "line",
    [
        _reply("1," * 3_000_000),
        _reply('"' + "\\\\" * 3_000_000 + '"'),
        _reply('"' + "ä" * 3_000_000 + '"'),
        _reply('["' + "x" * 100_000 + '", ' + '"abc", ' * 100_000 + "0]"),
    ],
    ids=range(4),
)
def test_a_reply_that_would_take_too_much_memory_is_not_parsed(line: bytes) -> None:
    with pytest.raises(MalformedReply, match="bytes besides long texts"):
        parse_reply(line)


def test_members_are_of_exactly_the_kind_asked_for() -> None:
    value = {"pid": 1, "exited": True, "load": 1.0, "nothing": None}
    assert member(value, "pid", int) == 1
    assert member(value, "exited", bool) is True
    assert optional(value, "absent", int) is None
    assert optional(value, "nothing", int) is None
    with pytest.raises(MalformedReply, match="'exited' is a boolean, not an integer"):
        member(value, "exited", int)
    with pytest.raises(MalformedReply, match="'load' is a number, not an integer"):
        optional(value, "load", int)
    with pytest.raises(MalformedReply, match="'absent' is missing"):
        member(value, "absent", int)
    with pytest.raises(MalformedReply, match="a text where an object belongs"):
        member("text", "pid", int)
