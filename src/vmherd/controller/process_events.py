"""What the callers of a program are told of it while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from vmherd.api.v1.process_pb2 import ProcessEvent
from vmherd.controller.process_messages import TextOutput, exited, process_message
from vmherd.controller.process_records import ProcessRecord
from vmherd.guest_agent import Output, Process


class ProcessEvents:
    """The events of a program that its caller waits for."""

    def __init__(self, process: Process, command: Sequence[str], timeout_s: float | None) -> None:
        self._process = process
        self._timeout_s = timeout_s
        self._text = TextOutput()
        self._record = ProcessRecord(
            uid="", id="", command=tuple(command), started_at_s=time.time(), generation=0, pid=process.pid
        )

    def start(self) -> Iterator[ProcessEvent]:
        """That it was started, and what is not as asked."""
        yield ProcessEvent(process=process_message(self._record))
        if self._process.notice:
            yield ProcessEvent(notice=self._process.notice)

    def output(self, piece: Output) -> Iterator[ProcessEvent]:
        """What it wrote."""
        return self._text.take(piece)

    def end(self) -> Iterator[ProcessEvent]:
        """The rest of its output, and how it ended if that was seen."""
        yield from self._text.rest()
        result = self._process.result
        if result is None:
            return
        if result.stdout_truncated or result.stderr_truncated:
            yield ProcessEvent(notice="the guest agent keeps 16 MiB of each output; there was more")
        reason = f"its time of {self._timeout_s:g} s was up" if self._process.timed_out else ""
        yield ProcessEvent(process=process_message(replace(exited(self._record, result), reason=reason)))
