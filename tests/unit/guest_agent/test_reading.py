"""The framing: any cutting of the stream, any garbage before a sync."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmherd.guest_agent.reading import LineDecoder, ReplyReader, SyncReader
from vmherd.guest_agent.wire import Failure, MalformedReply, Success


@pytest.mark.parametrize(
    "line",
    [
        b'{"return": 5, "id": 5}',
        b'\xff{"return": 6, "id": 5}',
        b'\xff{"return": 5, "id": 6}',
        b'\xff{"return": 5.0, "id": 5}x',
        b'\xff{"id": 5, "error": {"class": "GenericError", "desc": ""}}',
        b'\xff{"return": 5, "id": 5' + b" " * 300 + b"}",
        b"\xff",
        b'ming from far"}',
        b"",
    ],
)
def test_what_is_no_answer_to_a_sync(line: bytes) -> None:
    assert SyncReader(5).feed(line + b"\n") is None


def _in_pieces(stream: bytes, data: st.DataObject) -> list[bytes]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    return [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


GARBAGE = st.lists(
    st.sampled_from([b"\n", b"\xff", b"{", b'{"return": 5, "id": 4}', b'\xff{"return": 5, ', b"some text"])
    | st.binary(max_size=20)
).map(b"".join)


@given(GARBAGE, st.data())
def test_the_answer_to_a_sync_is_found_behind_any_garbage(garbage: bytes, data: st.DataObject) -> None:
    reader = SyncReader(5)
    found = [reader.feed(piece) for piece in _in_pieces(garbage + b'\xff{"return": 5, "id": 5}\n', data)]
    assert found.count(True) == 1
    assert not reader.has_rest


def test_garbage_before_a_sync_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        reader = SyncReader(5)
        for garbage in (b"x" * 10_000, b"\xff" * 10_000, b"\xff" + b"x" * 10_000):
            for _ in range(100):
                assert reader.feed(garbage) is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert reader.feed(b'\n\xff{"return": 5, "id": 5}\n')


@pytest.mark.parametrize("rest", [b"x", b"\xff", b'{"return": {}, "id": 1}\n'])
def test_what_follows_the_answer_to_a_sync_is_noticed(rest: bytes) -> None:
    reader = SyncReader(5)
    assert reader.feed(b'\xff{"return": 5, "id": 5}\n' + rest)
    assert reader.has_rest


OTHERS = st.lists(
    st.sampled_from([b'{"return": {}, "id": 8}', b'{"id": 9, "error": {"class": "c", "desc": "d"}}', b""])
)


@given(OTHERS, st.data())
def test_a_reply_is_found_among_others_in_any_pieces(others: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in [*others, b'{"return": "right", "id": 1}'])
    reader = ReplyReader((1,), 1000)
    found = [reply for piece in _in_pieces(stream, data) if (reply := reader.feed(piece))]
    assert found == [Success(1, "right")]
    assert not reader.has_rest


def test_the_replies_to_two_requests_sent_at_once() -> None:
    refusal, pong = b'{"id": 1, "error": {"class": "c", "desc": "d"}}\n', b'{"return": {}, "id": 2}\n'
    assert ReplyReader((1, 2), 1000).feed(pong) == Success(2, {})
    reader = ReplyReader((1, 2), 1000)
    assert reader.feed(refusal) is None
    assert reader.feed(pong) == Failure(1, "c", "d")
    reader = ReplyReader((1, 2), 1000)
    assert reader.feed(b'{"error": {"class": "c", "desc": "not parsed"}}\n') is None
    assert reader.feed(pong) == Failure(None, "c", "not parsed")


@pytest.mark.parametrize("rest", [b"x", b'{"return": {}, "id": 2}\n'])
def test_what_follows_a_reply_is_noticed(rest: bytes) -> None:
    reader = ReplyReader((1,), 1000)
    assert reader.feed(b'{"return": {}, "id": 1}\n' + rest)
    assert reader.has_rest


@given(st.lists(st.sampled_from([b"\n", b"\xff", b"{", b"a", b"\r\n", b"some text"])), st.data())
def test_lines_do_not_depend_on_the_pieces_they_come_in(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    decoder = LineDecoder(1000)
    lines = [line for piece in _in_pieces(stream, data) for line in decoder.feed(piece)]
    assert lines == [line for line in stream.split(b"\n")[:-1] if line]
    assert decoder.has_rest == (not stream.endswith(b"\n") and bool(stream))


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 1000])
def test_a_line_without_end_is_refused(piece_bytes: int) -> None:
    decoder = LineDecoder(max_line_bytes=100)
    assert decoder.feed(b"x" * 100 + b"\n") == [b"x" * 100]
    for _ in range(100 // piece_bytes):
        assert decoder.feed(b"x" * piece_bytes) == []
    with pytest.raises(MalformedReply, match="more than 100 bytes"):
        decoder.feed(b"x" * piece_bytes)
