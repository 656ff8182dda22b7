from __future__ import annotations

from typing import Any

import pytest

from vmherd.api.v1.process_pb2 import ProcessOutput, RunRequest
from vmherd.controller.detached import PAGE_SIZE_MAX, page_of
from vmherd.controller.process_messages import (
    COMMAND_MAX_BYTES,
    INPUT_MAX_BYTES,
    TextOutput,
    check_command,
    check_signal,
    process_message,
    run_response,
    timeout_s,
)
from vmherd.controller.process_records import ProcessRecord, ProcessState, decode_process, encode_process
from vmherd.guest_agent import CommandResult, Output, Stream
from vmherd.model.errors import InvalidArgument


def record(**fields: Any) -> ProcessRecord:
    defaults = {"uid": "u", "id": "0a", "command": ("true",), "started_at_s": 1.5, "generation": 1, "pid": 7}
    return ProcessRecord(**(defaults | fields))


def result(exit_code: int | None = 0, signal: int | None = None, stdout: bytes = b"") -> CommandResult:
    return CommandResult(exit_code, signal, stdout, b"", stdout_truncated=False, stderr_truncated=False)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"command": []}, "command"),
        ({"command": [""]}, "command"),
        ({"command": ["a\0b"]}, "command"),
        ({"command": ["a" * (COMMAND_MAX_BYTES + 1)]}, "command"),
        ({"environment": {"A": "ä" * (COMMAND_MAX_BYTES // 2)}}, "command"),
        ({"command": ["a"] * 1025}, "command"),
        ({"environment": {"": "x"}}, "environment['']"),
        ({"environment": {"A=B": "x"}}, "environment['A=B']"),
        ({"environment": {"A": "\0"}}, "environment['A']"),
        ({"input": bytes(INPUT_MAX_BYTES + 1)}, "input"),
    ],
)
def test_what_no_program_can_be_started_with_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_command(RunRequest(**({"command": ["true"]} | fields)))
    assert [violation.field for violation in caught.value.violations] == [field]


def test_a_command_as_people_write_it_is_taken() -> None:
    check_command(RunRequest(command=["printf", "", "a b"], environment={"A": "b=c", "B": ""}, input=b"\0"))


@pytest.mark.parametrize("number", [-1, 0, 65])
def test_what_is_no_signal_is_refused(number: int) -> None:
    with pytest.raises(InvalidArgument):
        check_signal(number)
    check_signal(1)
    check_signal(64)


def test_a_timeout_is_none_or_in_bounds() -> None:
    assert timeout_s(RunRequest()) is None
    request = RunRequest()
    request.timeout.FromMilliseconds(1500)
    assert timeout_s(request) == 1.5
    request.timeout.FromSeconds(90_000)
    with pytest.raises(InvalidArgument):
        timeout_s(request)


def test_an_exit_code_is_as_shells_have_it() -> None:
    assert run_response(result(3)).exit_code == 3
    killed = run_response(result(None, 9))
    assert (killed.exit_code, killed.signal) == (137, 9)


def test_text_has_its_exact_bytes_beside_it_where_it_lost_some() -> None:
    plain = run_response(result(stdout="größer".encode()))
    assert (plain.stdout, plain.HasField("stdout_raw")) == ("größer", False)
    raw = run_response(result(stdout=b"a\xff"))
    assert (raw.stdout, raw.stdout_raw) == ("a\ufffd", b"a\xff")


def streamed(*pieces: bytes) -> list[ProcessOutput]:
    text, offset, found = TextOutput(), 0, []
    for piece in pieces:
        found += text.take(Output(Stream.STDOUT, offset, piece))
        offset += len(piece)
    return [event.output for event in (*found, *text.rest())]


@pytest.mark.parametrize("at", range(1, 8))
def test_a_streams_text_is_never_cut_inside_a_character(at: int) -> None:
    data = "aä😀b".encode()
    outputs = streamed(data[:at], data[at:])
    assert "".join(output.text for output in outputs) == "aä😀b"
    assert not any(output.HasField("raw") for output in outputs)
    assert [output.offset for output in outputs] == [0, len(outputs[0].text.encode())][: len(outputs)]


def test_a_streams_bytes_are_exact_whatever_they_are() -> None:
    data = bytes(range(256)) + "ä".encode()[:1]
    outputs = streamed(*(data[start : start + 1] for start in range(len(data))))
    exact = [output.raw if output.HasField("raw") else output.text.encode() for output in outputs]
    assert b"".join(exact) == data
    assert [output.offset for output in outputs] == [sum(map(len, exact[:index])) for index in range(len(exact))]


def test_both_streams_keep_their_own_unfinished_characters() -> None:
    text = TextOutput()
    first, second = "ä".encode(), "ö".encode()
    pieces = [(Stream.STDOUT, 0, first[:1]), (Stream.STDERR, 0, second[:1])]
    pieces += [(Stream.STDOUT, 1, first[1:]), (Stream.STDERR, 1, second[1:])]
    events = [event for piece in pieces for event in text.take(Output(*piece))]
    assert [(event.output.stream, event.output.offset, event.output.text) for event in events] == [
        (ProcessOutput.STDOUT, 0, "ä"),
        (ProcessOutput.STDERR, 0, "ö"),
    ]


def test_a_record_survives_the_store() -> None:
    kept = record(state=ProcessState.EXITED, exit_code=3, ended_at_s=2.5, deadline_at_s=9.0, token="t", boot_id="b")
    assert decode_process(encode_process(kept)) == kept


def test_a_process_has_no_exit_code_before_its_end() -> None:
    running = process_message(record())
    assert not running.HasField("exit_code")
    assert not running.HasField("end_time")
    ended = process_message(record(state=ProcessState.EXITED, exit_code=0, ended_at_s=2.0))
    assert (ended.HasField("exit_code"), ended.end_time.seconds) == (True, 2)


def test_pages_are_in_the_order_of_start_and_miss_nothing() -> None:
    records = [record(id=f"{9 - number:02}", started_at_s=1_700_000_000.0 + number // 2) for number in range(7)]
    found: list[ProcessRecord] = []
    token = ""
    while True:
        page, token = page_of(records, size=3, token=token)
        found += page
        if not token:
            break
    assert sorted(found, key=lambda record: record.id) == sorted(records, key=lambda record: record.id)
    assert [record.started_at_s for record in found] == sorted(record.started_at_s for record in records)
    with pytest.raises(InvalidArgument):
        page_of(records, size=-1, token="")


def test_a_page_has_a_most() -> None:
    records = [record(id=f"{number:04}") for number in range(PAGE_SIZE_MAX + 1)]
    page, token = page_of(records, size=2**31 - 1, token="")
    assert len(page) == PAGE_SIZE_MAX
    assert token
