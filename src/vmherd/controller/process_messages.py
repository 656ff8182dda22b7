"""Between programs in guests and the messages of ProcessService."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from vmherd.api.v1 import process_pb2
from vmherd.controller import convert
from vmherd.controller.process_records import ProcessRecord, ProcessState
from vmherd.guest_agent import CommandResult, Output, Stream
from vmherd.model.errors import FieldViolation, InvalidArgument

TIMEOUT_MIN_S = 0.001
WORDS_MAX = 1024
COMMAND_MAX_BYTES = 1 << 20
"""For its words and its environment; Linux as a rule takes twice as much."""

INPUT_MAX_BYTES = 16 << 20
SIGNALS = range(1, 65)
NAME_SHOWN = 64
"""How much of a wrong variable's name an error shows."""

Command = process_pb2.RunRequest | process_pb2.StartProcessRequest


def check_command(request: Command) -> None:
    """Refuses what no program can be started with; raises `InvalidArgument`."""
    violations = []
    if not request.command or not request.command[0]:
        violations.append(FieldViolation("command", 'must be a list of words, such as ["uname", "-a"]'))
    if len(request.command) > WORDS_MAX:
        violations.append(FieldViolation("command", f"must have at most {WORDS_MAX} words"))
    variables = [text for variable in request.environment.items() for text in variable]
    if sum(len(text.encode()) for text in (*request.command, *variables)) > COMMAND_MAX_BYTES:
        why = f"must have at most {COMMAND_MAX_BYTES} bytes together with the environment"
        violations.append(FieldViolation("command", why))
    if any("\0" in word for word in request.command):
        violations.append(FieldViolation("command", "must not hold a NUL character"))
    for key, value in request.environment.items():
        if not key or "=" in key or "\0" in key + value:
            field = f"environment[{key[:NAME_SHOWN]!r}]"
            violations.append(FieldViolation(field, "a name is not empty, and without '=' and NUL"))
    if len(request.input) > INPUT_MAX_BYTES:
        violations.append(FieldViolation("input", f"must have at most {INPUT_MAX_BYTES} bytes"))
    if violations:
        raise InvalidArgument.of(violations)


def check_signal(number: int) -> None:
    """Refuses what is no signal; raises `InvalidArgument`."""
    if number not in SIGNALS:
        why = f"must be from {SIGNALS[0]} to {SIGNALS[-1]}, is {number}"
        raise InvalidArgument.of([FieldViolation("signal", why)])


def timeout_s(request: Command) -> float | None:
    """How long a command may take, None without a limit; raises `InvalidArgument`."""
    if not request.HasField("timeout"):
        return None
    return convert.seconds(request, "timeout", default_s=0, minimum_s=TIMEOUT_MIN_S)


def text_of(output: bytes) -> tuple[str, bytes | None]:
    """Output as text, and the exact bytes where the text had to replace something."""
    try:
        return output.decode(), None
    except UnicodeDecodeError:
        return output.decode(errors="replace"), output


def exit_code_of(result: CommandResult) -> int:
    """The exit code as shells have it: 128 and the number of a signal that ended the program."""
    return 128 + result.signal if result.signal is not None else result.exit_code or 0


def exited(record: ProcessRecord, result: CommandResult) -> ProcessRecord:
    """The record of a program whose end was seen just now."""
    return replace(
        record,
        state=ProcessState.EXITED,
        ended_at_s=time.time(),
        exit_code=exit_code_of(result),
        signal=result.signal,
    )


def run_response(result: CommandResult, notice: str = "") -> process_pb2.RunResponse:
    """How a command ended, with its output."""
    stdout, stdout_raw = text_of(result.stdout)
    stderr, stderr_raw = text_of(result.stderr)
    return process_pb2.RunResponse(
        exit_code=exit_code_of(result),
        signal=result.signal,
        stdout=stdout,
        stderr=stderr,
        stdout_raw=stdout_raw,
        stderr_raw=stderr_raw,
        stdout_truncated=result.stdout_truncated,
        stderr_truncated=result.stderr_truncated,
        notice=notice,
    )


def process_message(record: ProcessRecord) -> process_pb2.Process:
    """A process as it stands."""
    message = process_pb2.Process(
        id=record.id,
        pid=record.pid,
        command=record.command,
        state=process_pb2.Process.State.Value(record.state),
        start_time=_timestamp(record.started_at_s),
        exit_code=record.exit_code,
        signal=record.signal,
        reason=record.reason,
    )
    if record.ended_at_s is not None:
        message.end_time.CopyFrom(_timestamp(record.ended_at_s))
    return message


class TextOutput:
    """Turns output into events whose text is never cut inside a character."""

    def __init__(self) -> None:
        self._kept: dict[Stream, Output] = {}

    def take(self, piece: Output) -> Iterator[process_pb2.ProcessEvent]:
        """The events for the next piece; the beginning of a character at its end is kept back."""
        if kept := self._kept.pop(piece.stream, None):
            piece = Output(piece.stream, kept.offset, kept.data + piece.data)
        _, used = codecs.utf_8_decode(piece.data, "replace", False)
        if used:
            yield _output(Output(piece.stream, piece.offset, piece.data[:used]))
        if used < len(piece.data):
            self._kept[piece.stream] = Output(piece.stream, piece.offset + used, piece.data[used:])

    def rest(self) -> Iterator[process_pb2.ProcessEvent]:
        """The events for what was kept back, when nothing more comes."""
        return map(_output, self._kept.values())


def _output(piece: Output) -> process_pb2.ProcessEvent:
    text, raw = text_of(piece.data)
    stream = process_pb2.ProcessOutput.Stream.Value(piece.stream.name)
    return process_pb2.ProcessEvent(
        output=process_pb2.ProcessOutput(stream=stream, offset=piece.offset, text=text, raw=raw)
    )


def _timestamp(epoch_s: float) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(datetime.fromtimestamp(epoch_s, UTC))
    return message
