"""What the controller keeps of programs that outlive their callers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pydantic import TypeAdapter

PROCESSES = "processes/"
"""Beside `instances/` and `requests/`; then the instance's uid, so that the next one of its name starts anew."""


class ProcessState(StrEnum):
    """How far a program has come."""

    RUNNING = "RUNNING"
    EXITED = "EXITED"
    LOST = "LOST"


@dataclass(frozen=True)
class ProcessRecord:
    """A program that was started in a guest."""

    uid: str
    """Of the instance."""
    id: str
    command: tuple[str, ...]
    started_at_s: float
    generation: int
    """Of the instance: its next start loses the program."""
    boot_id: str = ""
    """Of the guest's boot, which a reset ends within one generation; empty where the guest does not tell."""
    pid: int = 0
    token: str = ""
    """Names its files in the guest."""
    deadline_at_s: float | None = None
    state: ProcessState = ProcessState.RUNNING
    ended_at_s: float | None = None
    exit_code: int | None = None
    signal: int | None = None
    reason: str = ""


_RECORD = TypeAdapter(ProcessRecord)


def processes_of(uid: str) -> str:
    """What the keys of an instance's programs begin with."""
    return f"{PROCESSES}{uid}/"


def process_key(record: ProcessRecord) -> str:
    """The key of a record."""
    return processes_of(record.uid) + record.id


def encode_process(record: ProcessRecord) -> bytes:
    """The record's bytes."""
    return _RECORD.dump_json(record)


def decode_process(value: bytes) -> ProcessRecord:
    """The record from its bytes; raises `ValueError` when they are none."""
    return _RECORD.validate_json(value)
