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
    LineDecoder,
    MalformedReply,
    Success,
    encode_request,
    encode_sync,
    is_sync_reply,
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


@pytest.mark.parametrize(
    "line",
    [
        b'{"return": 5, "id": 5}',
        b'\xff{"return": 6, "id": 5}',
        b'\xff{"return": 5, "id": 6}',
        b'\xff{"return": 5.0, "id": 5}x',
        b'\xff{"id": 5, "error": {"class": "GenericError", "desc": ""}}',
        b"\xff",
        b'ming from far"}',
    ],
)
def test_what_is_no_answer_to_a_sync(line: bytes) -> None:
    assert not is_sync_reply(line, 5)


def test_the_answer_to_a_sync() -> None:
    assert is_sync_reply(b'\xff{"return": 5, "id": 5}', 5)


def test_a_delimiter_voids_the_beginning_of_its_line() -> None:
    decoder = LineDecoder()
    assert decoder.feed(b'first\n{"half a rep\xffgarb') == [b"first"]
    assert decoder.feed(b'age\xff{"return": 5}\nnext\n\n') == [b'\xff{"return": 5}', b"next"]


@given(st.lists(st.sampled_from([b"\n", b"\xff", b"{", b"a", b"\r\n", b"some text"])), st.data())
def test_lines_do_not_depend_on_the_pieces_they_come_in(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    decoder = LineDecoder()
    lines = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        lines += decoder.feed(stream[start:end])
    complete = stream.split(b"\n")[:-1]
    assert lines == [line[max(line.rfind(b"\xff"), 0) :] for line in complete if line]


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 1000])
def test_a_line_without_end_is_refused(piece_bytes: int) -> None:
    decoder = LineDecoder(max_line_bytes=100)
    assert decoder.feed(b"x" * 100 + b"\n") == [b"x" * 100]
    for _ in range(100 // piece_bytes):
        assert decoder.feed(b"x" * piece_bytes) == []
    with pytest.raises(MalformedReply, match="more than 100 bytes"):
        decoder.feed(b"x" * piece_bytes)


def test_an_endless_run_of_delimiters_takes_no_memory() -> None:
    decoder = LineDecoder(max_line_bytes=100)
    for _ in range(1000):
        assert decoder.feed(b"\xff" * 1000) == []
    assert decoder.feed(b"\xffx\n") == [b"\xffx"]


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
