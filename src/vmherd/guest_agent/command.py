"""Running a program in the guest."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from vmherd.guest_agent.agent import GuestAgent
from vmherd.guest_agent.errors import AgentError, CommandUnfinished
from vmherd.guest_agent.wire import MalformedReply, member, optional

# Most programs end within milliseconds. The pauses grow, so that one that runs for long leaves the agent to others.
_FIRST_PAUSE_S = 0.005
_LAST_PAUSE_S = 0.25
_PAUSE_GROWTH = 1.5


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a program ended, and what it wrote.

    `exit_code` is None for a program that a signal ended (on Windows, an exception): then `signal` has its number. The
    agent keeps 16 MiB of each stream and drops the rest, which `stdout_truncated` and `stderr_truncated` tell.
    """

    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    stdout_truncated: bool
    stderr_truncated: bool


async def run(
    agent: GuestAgent,
    argv: Sequence[str],
    *,
    input_data: bytes = b"",
    env: Mapping[str, str] | None = None,
    timeout_s: float,
) -> CommandResult:
    """Run a program in the guest, wait for its end and give its result; no shell is involved.

    `argv[0]` is a path, or a name that the agent looks up in its own PATH. `input_data` is what the program reads on
    its standard input. `env` replaces the agent's own environment. A program counts as running while any process that
    it started holds its output open.

    Raises CommandUnfinished if the program was started and its end was not seen within `timeout_s`, or contact was
    lost: it is not stopped. A cancelled call does not stop it either. Raises what `GuestAgent` raises if it was not
    started; CommandFailed if there is no such program.
    """
    if isinstance(argv, str) or not argv:
        raise ValueError("argv is a list of at least one word")
    loop = asyncio.get_running_loop()
    started = loop.time()
    deadline = started + timeout_s
    arguments: dict[str, object] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
    if input_data:
        arguments["input-data"] = base64.b64encode(input_data).decode()
    if env is not None:
        arguments["env"] = [f"{name}={value}" for name, value in env.items()]
    pid = await agent.ask("guest-exec", _parse_pid, arguments, timeout_s=timeout_s)

    unfinished = partial(CommandUnfinished, command="guest-exec", pid=pid)
    pause_s = _FIRST_PAUSE_S
    # A status whose reply comes too late is lost, since the agent gives it once: the last pause leaves time for it.
    while (left_s := deadline - loop.time()) > _FIRST_PAUSE_S:
        await asyncio.sleep(min(pause_s, left_s / 2))
        pause_s = min(pause_s * _PAUSE_GROWTH, _LAST_PAUSE_S)
        try:
            result = await agent.ask("guest-exec-status", _parse_status, {"pid": pid}, timeout_s=deadline - loop.time())
        except AgentError as error:
            raise unfinished(
                f"{argv[0]} was started as process {pid} and its end was not seen: {error.message}",
                elapsed_s=loop.time() - started,
            ) from error
        if result is not None:
            return result
    raise unfinished(
        f"{argv[0]} did not end within {timeout_s:.3g} s and may still run in the guest as process {pid}",
        elapsed_s=loop.time() - started,
    )


def _parse_pid(value: object) -> int:
    return member(value, "pid", int)


def _parse_status(value: object) -> CommandResult | None:
    if not member(value, "exited", bool):
        return None
    return CommandResult(
        exit_code=optional(value, "exitcode", int),
        signal=optional(value, "signal", int),
        stdout=_decode(value, "out-data"),
        stderr=_decode(value, "err-data"),
        stdout_truncated=optional(value, "out-truncated", bool) or False,
        stderr_truncated=optional(value, "err-truncated", bool) or False,
    )


def _decode(value: object, name: str) -> bytes:
    try:
        return base64.b64decode(optional(value, name, str) or "", validate=True)
    except ValueError as error:
        raise MalformedReply(f"'{name}' is not base64: {error}") from error
