"""Programs in a guest as the agent itself knows them: it starts them, tells their end once, and cannot signal them."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vmherd.guest_agent.agent import GuestAgent
from vmherd.guest_agent.errors import CommandFailed, CommandUnfinished
from vmherd.guest_agent.holding import uninterrupted
from vmherd.guest_agent.wire import MalformedReply, member, optional

# Most programs end within milliseconds. The pauses grow, so that one that runs for long leaves the agent to others.
_FIRST_PAUSE_S = 0.003
_LAST_PAUSE_S = 0.25
_PAUSE_GROWTH = 1.3


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


def pauses() -> Iterator[float]:
    """Give the pauses in seconds between looks at a program, without an end."""
    pause_s = _FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(pause_s * _PAUSE_GROWTH, _LAST_PAUSE_S)


async def start(
    agent: GuestAgent,
    argv: Sequence[str],
    *,
    input_data: bytes = b"",
    env: Mapping[str, str] | None = None,
    keep_output: bool = True,
    timeout_s: float,
) -> int:
    """Start a program and give its process id. Raises what `GuestAgent` raises; CommandFailed if there is none."""
    arguments: dict[str, object] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": keep_output}
    if input_data:
        arguments["input-data"] = base64.b64encode(input_data).decode()
    if env is not None:
        arguments["env"] = [f"{name}={value}" for name, value in env.items()]
    return await agent.ask("guest-exec", _parse_pid, arguments, timeout_s=timeout_s)


async def ask_status(agent: GuestAgent, pid: int, *, timeout_s: float) -> CommandResult | None:
    """Give how a program ended, None while it runs. The agent tells an end once and then forgets the program."""
    return await agent.ask("guest-exec-status", _parse_status, {"pid": pid}, timeout_s=timeout_s)


async def complete(agent: GuestAgent, argv: Sequence[str], *, timeout_s: float) -> CommandResult:
    """Run one of our own programs, which ends by itself within moments, to its end, also for a caller that leaves.

    Raises what `GuestAgent` raises, and CommandUnfinished if it does not end.
    """
    return await uninterrupted(_complete(agent, argv, timeout_s))


async def _complete(agent: GuestAgent, argv: Sequence[str], timeout_s: float) -> CommandResult:
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    pid = await start(agent, argv, timeout_s=timeout_s)
    for pause_s in pauses():
        await asyncio.sleep(pause_s)
        left_s = started_s + timeout_s - loop.time()
        if left_s <= 0:
            break
        if result := await ask_status(agent, pid, timeout_s=left_s):
            return result
    message = f"process {pid} ({argv[0]}) did not end within {timeout_s:.3g} s"
    raise CommandUnfinished(message, command="guest-exec", elapsed_s=loop.time() - started_s, pid=pid)


# The agent is the parent of what it started and of this script. So a process that has the id of a program that is gone
# is told from it by its parent. Processes that lost their parents to init are no descendants any more.
_FAMILY = r"""
family() {
  relations=
  for directory in /proc/[0-9]*; do
    while read -r key value; do
      case $key in PPid:) relations="$relations ${directory#/proc/}:$value"; break;; esac
    done <"$directory/status"
  done 2>/dev/null
  case "$relations " in *" $pid:$PPID "*) ;; *) [ "$members" ] || return;; esac
  members=${members:-" $pid "}
  grown=yes
  while [ "$grown" ]; do
    grown=
    for relation in $relations; do
      case $members in *" ${relation%:*} "*) continue;; esac
      case $members in *" ${relation#*:} "*) members="$members${relation%:*} "; grown=yes;; esac
    done
  done
}
pid=$1 members=
family
[ "$members" ] || exit 3
"""

_SIGNAL = (
    _FAMILY
    + r"""
kill -"$2" "$pid" || exit
for member in $members; do [ "$member" = "$pid" ] || kill -"$2" "$member"; done 2>/dev/null
exit 0
"""
)

# KILL reaches those as well that were started while we looked.
_END = (
    _FAMILY
    + r"""
is_alive() {
  while read -r key value; do
    case $key in State:) case $value in [ZX]*) return 1;; esac; return 0;; esac
  done <"/proc/$1/status" 2>/dev/null
  return 1
}
kill -TERM $members 2>/dev/null
tries=0
while [ $tries -lt 40 ]; do
  alive=
  for member in $members; do is_alive "$member" && alive=yes && break; done
  [ "$alive" ] || exit 0
  sleep 0.05 2>/dev/null || { sleep 1; tries=$((tries + 19)); }
  tries=$((tries + 1))
done
family
kill -KILL $members 2>/dev/null
exit 0
"""
)
_GONE = 3


async def signal_family(agent: GuestAgent, pid: int, number: int, *, timeout_s: float) -> bool:
    """Send a signal to a program and to the processes that it started; False if it is gone.

    Raises what `GuestAgent` raises, CommandFailed if there is no shell or no such signal, and CommandUnfinished.
    """
    return await _run_script(agent, _SIGNAL, pid, str(number), timeout_s=timeout_s)


async def end_family(agent: GuestAgent, pid: int, *, timeout_s: float) -> bool:
    """End a program and the processes that it started: SIGTERM, and SIGKILL for those left after 2 s; False if gone.

    Raises what `GuestAgent` raises, CommandFailed if there is no shell, and CommandUnfinished.
    """
    return await _run_script(agent, _END, pid, timeout_s=timeout_s)


async def _run_script(agent: GuestAgent, script: str, pid: int, *words: str, timeout_s: float) -> bool:
    argv = ["/bin/sh", "-c", script, "sh", str(pid), *words]
    result = await complete(agent, argv, timeout_s=timeout_s)
    if result.exit_code not in (0, _GONE):
        said = result.stderr.decode(errors="replace").strip()
        raise CommandFailed("GenericError", f"kill: {said}", command="guest-exec", elapsed_s=0)
    return result.exit_code == 0


def _parse_pid(value: object) -> int:
    return member(value, "pid", int)


def _parse_status(value: object) -> CommandResult | None:
    if not member(value, "exited", bool):
        return None
    return CommandResult(
        exit_code=optional(value, "exitcode", int),
        signal=optional(value, "signal", int),
        stdout=decode_bytes(value, "out-data"),
        stderr=decode_bytes(value, "err-data"),
        stdout_truncated=optional(value, "out-truncated", bool) or False,
        stderr_truncated=optional(value, "err-truncated", bool) or False,
    )


def decode_bytes(value: object, name: str) -> bytes:
    """Give the bytes that a member holds in base64; none where it is absent. Raises MalformedReply."""
    try:
        return base64.b64decode(optional(value, name, str) or "", validate=True)
    except ValueError as error:
        raise MalformedReply(f"'{name}' is not base64: {error}") from error
