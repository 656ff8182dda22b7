"""Running programs in a guest as people expect it.

::

    result = await run(agent, ["uname", "-a"], timeout_s=5)

    async with open_process(agent, ["make", "test"]) as process:
        async for output in process.output():
            print(output.stream, output.data)
        print(process.result.exit_code)

A program whose caller leaves early, or whose time is up, is ended together with the processes that it started. To start
one that outlives its caller there is `start_process`; `Process(agent, pid, token)` is the same program again, later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import replace
from types import MappingProxyType

from vmherd.guest_agent import programs, spool
from vmherd.guest_agent.agent import GuestAgent
from vmherd.guest_agent.errors import (
    AgentError,
    AgentFrozen,
    AgentUnavailable,
    CommandFailed,
    CommandTimedOut,
    CommandUnavailable,
    CommandUnfinished,
)
from vmherd.guest_agent.holding import eventually, held, uninterrupted, urgently
from vmherd.guest_agent.programs import CommandResult, pauses
from vmherd.guest_agent.spool import CALL_TIMEOUT_S, Output, Stream

START_TIMEOUT_S = 10.0
END_TIMEOUT_S = 10.0
"""Until a program that is ended has to be gone; SIGKILL comes after 2 s."""

CLEAN_UP_TIMEOUT_S = 3.0
"""For each call at the end of a program: an agent that hangs must not hold its callers for long. Such calls are urgent,
so that those of others take nothing of it."""

REMOVE_TRIES = 3
"""`rm` fails where a file is made while it removes the folder, as happens when a program is ended."""

INPUT_PIECE_BYTES = 512 << 10


class NoLiveOutput(Exception):
    """This guest cannot show output while a program runs; nothing was run. The text says why."""


class Process:
    """A program that was started in a guest; one object for each of them, since the agent tells its end once.

    `pid` is its process id in the guest. `result` is None until its end was seen; its `stdout` and `stderr` are empty
    where `output` has them from files. `notice` says what is not as asked, for people, and is empty as a rule.
    """

    def __init__(self, agent: GuestAgent, pid: int, token: str = "", *, notice: str = "") -> None:
        self.pid = pid
        self.token = token
        self.notice = notice
        self.result: CommandResult | None = None
        self.timed_out = False
        self._agent = agent
        self._asking = asyncio.Lock()
        self._input = AsyncExitStack()
        self._takes_input = False
        self._feeder: Process | None = None
        self._failure: Exception | None = None
        self._since = asyncio.get_running_loop().time()
        self._told_to_end = False
        self._was_begun = False

    async def has_ended(self, *, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """Tell whether the program has ended, and take note of its result.

        Raises CommandUnfinished if that cannot be found out.
        """
        async with self._asking:
            if self.result is None:
                # The reply to a question that was given up would be lost, and with it the result.
                await uninterrupted(self._ask(timeout_s))
            return self.result is not None

    async def wait(self, *, timeout_s: float) -> CommandResult:
        """Wait for the end. Raises TimeoutError if it does not come, and CommandUnfinished."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        for pause_s in pauses():
            left_s = deadline - loop.time()
            if left_s <= 0:
                break
            await asyncio.sleep(min(pause_s, left_s))
            left_s = deadline - loop.time()
            # A reply that comes too late is lost, and the result with it, so there is a margin.
            question = self.has_ended(timeout_s=max(left_s, 0) + CLEAN_UP_TIMEOUT_S)
            if await (question if left_s > 0 else urgently(question)):
                break
        if self.result is None:
            raise TimeoutError
        return self.result

    async def output(self, offsets: Mapping[Stream, int] = MappingProxyType({})) -> AsyncGenerator[Output]:
        """Give what the program writes as it comes, from these offsets on, until it has ended.

        Raises CommandUnfinished if its end could not be found out, what `GuestAgent` raises, CommandFailed if the
        output is no longer in the guest, and what `fail` was called with.
        """
        if self.token:
            async with aclosing(spool.follow(self._agent, self.token, self._has_ended_well, offsets=offsets)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        for pause_s in pauses():
            if await self._has_ended_well():
                break
            await asyncio.sleep(pause_s)
        if result := self.result:
            for stream, data in ((Stream.STDOUT, result.stdout), (Stream.STDERR, result.stderr)):
                start = offsets.get(stream, 0)
                if data[start:]:
                    yield Output(stream, start, data[start:])

    async def write(self, data: bytes) -> None:
        """Give the program more input, and wait until it has room for it; nothing if it has ended or takes none.

        Raises what `GuestAgent` raises, and CommandUnfinished: then some of the input may be lost.
        """
        for start in range(0, len(data), INPUT_PIECE_BYTES):
            if not self._takes_input:
                return
            await self._feed(data[start : start + INPUT_PIECE_BYTES])

    async def close_input(self) -> None:
        """Tell the program that its input has ended."""
        self._takes_input = False
        await uninterrupted(self._input.aclose())

    def fail(self, error: Exception) -> None:
        """Let whoever waits for the output hear what went wrong beside it, for instance with the input."""
        self._failure = error

    async def signal(self, number: int) -> bool:
        """Send a signal to the program and to the processes that it started; False if it has ended.

        Raises what `GuestAgent` raises; CommandFailed if the guest has no shell or no such signal.
        """
        if await self.has_ended():
            return False
        return await programs.signal_family(self._agent, self.pid, number, timeout_s=CALL_TIMEOUT_S)

    async def end(self) -> CommandResult:
        """End the program and the processes that it started: SIGTERM, and SIGKILL for those left after 2 s.

        Raises CommandUnfinished if the end was not seen.
        """
        return await urgently(self._end())

    async def remove_files(self) -> None:
        """Remove what the program wrote from the guest."""
        if self.token:
            words = ["rm", "-rf", "--", spool.folder_of(self.token)]
            for _ in range(REMOVE_TRIES):
                removing = programs.complete(self._agent, words, timeout_s=CLEAN_UP_TIMEOUT_S)
                if (await urgently(removing)).exit_code == 0:
                    return

    async def _end(self) -> CommandResult:
        if await self.has_ended(timeout_s=CLEAN_UP_TIMEOUT_S):
            assert self.result is not None  # noqa: S101
            return self.result
        self._told_to_end = True
        try:
            await programs.end_family(self._agent, self.pid, timeout_s=END_TIMEOUT_S)
        except CommandUnfinished as error:
            raise self._unfinished("it did not end when it was told to") from error
        except AgentError as error:
            self._told_to_end = not isinstance(error, AgentFrozen)
            raise self._unfinished(f"it could not be ended: {error.message}") from error
        try:
            return await self.wait(timeout_s=CLEAN_UP_TIMEOUT_S)
        except TimeoutError as error:
            raise self._unfinished("it did not end when it was told to") from error

    async def _ask(self, timeout_s: float) -> None:
        with suppress(AgentFrozen):  # after the thaw it answers
            try:
                result = await programs.ask_status(self._agent, self.pid, timeout_s=timeout_s)
                if result and self.token:
                    self._was_begun = result.stdout == spool.OPEN
                    result = replace(result, stdout=b"")
                self.result = result
            except AgentFrozen:
                raise
            except AgentError as error:
                raise self._unfinished(f"its end was not seen: {error.message}") from error

    async def _feed(self, piece: bytes) -> None:
        """Write a piece of input with a program, which waits for room; the agent's own write does not."""
        waits = pauses()
        feeder: Process | None = None
        while self.result is None:
            with suppress(AgentFrozen):
                if not feeder:
                    feeder = await uninterrupted(self._start_feeder(piece))
                if await feeder.has_ended():
                    break
            await asyncio.sleep(next(waits))
        if feeder and feeder.result and feeder.result.exit_code != 0 and not await self.has_ended():
            raise self._unfinished("some of its input is lost: what passes it on failed")

    async def _start_feeder(self, piece: bytes) -> Process:
        words = spool.feeding(self.token)
        timeout_s = CALL_TIMEOUT_S
        pid = await programs.start(self._agent, words, input_data=piece, keep_output=False, timeout_s=timeout_s)
        self._feeder = Process(self._agent, pid)
        return self._feeder

    async def _has_ended_well(self) -> bool:
        if self._failure:
            raise self._failure
        return await self.has_ended()

    def _unfinished(self, what: str) -> CommandUnfinished:
        elapsed_s = asyncio.get_running_loop().time() - self._since
        message = f"process {self.pid} was started and {what}"
        return CommandUnfinished(message, command="guest-exec", elapsed_s=elapsed_s, pid=self.pid)

    async def _open_input(self) -> None:
        fifo = spool.path_of(self.token, "in")
        await self._input.enter_async_context(spool.opened(self._agent, fifo, "r+"))  # which waits for no other side
        self._takes_input = True

    async def _expire(self, timeout_s: float) -> None:
        await asyncio.sleep(timeout_s)
        try:
            if not await self.has_ended():
                self.timed_out = True
                await uninterrupted(self.end())
        except AgentError as error:
            self.fail(error)

    async def _clean_up(self) -> None:
        """Leave no process and no file behind, as far as the agent still answers: nobody listens any more."""
        await eventually(self._agent, self._tidy)

    async def _tidy(self) -> None:
        try:
            if self.result is None and not self._told_to_end:
                await self.end()
        except CommandUnfinished as error:
            if isinstance(error.__cause__, AgentUnavailable | AgentFrozen):
                raise error.__cause__ from None
        with suppress(CommandUnfinished, TimeoutError):
            await self.close_input()
            if self._feeder and not self._feeder.result:
                await self._feeder.wait(timeout_s=CLEAN_UP_TIMEOUT_S)
        await self.remove_files()


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
    it started holds its output open. Where the caller is cancelled it is ended.

    Raises CommandTimedOut if it was ended because `timeout_s` had passed, CommandUnfinished if its end was not seen,
    and what `GuestAgent` raises if it was not started; CommandFailed if there is no such program.
    """
    _check(argv)
    loop = asyncio.get_running_loop()
    started = loop.time()
    starting = _start_captured(agent, argv, input_data, env, timeout_s)
    async with held(starting, Process._clean_up) as process:
        try:
            return await process.wait(timeout_s=started + timeout_s - loop.time())
        except TimeoutError:
            await uninterrupted(process.end())
            raise CommandTimedOut(
                f"{argv[0]} did not end within {timeout_s:.3g} s and was ended",
                command="guest-exec",
                elapsed_s=loop.time() - started,
                pid=process.pid,
            ) from None


@asynccontextmanager
async def open_process(
    agent: GuestAgent,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    input_data: bytes = b"",
    stdin: bool = False,
    timeout_s: float | None = None,
) -> AsyncIterator[Process]:
    """Run a program in the guest, with its output while it runs; it is ended when the context is left.

    Its standard input is `input_data`, or with `stdin` what `Process.write` gives it. When `timeout_s` has passed it is
    ended, and `timed_out` is true then. A program that does not exist has the exit code 127, and one that cannot be run
    126, as a shell has it.

    A guest without a POSIX shell, or with a /tmp that cannot be written, shows the output at the end, at most 16 MiB of
    each stream, and takes no `stdin`; `notice` says so. Raises what `GuestAgent` raises if nothing was started.
    """
    _check(argv)
    start_timeout_s = START_TIMEOUT_S if timeout_s is None else min(START_TIMEOUT_S, timeout_s)
    starting = _start(agent, argv, env, input_data, stdin=stdin, timeout_s=start_timeout_s)
    async with held(starting, Process._clean_up) as process:
        watching = None if timeout_s is None else asyncio.create_task(process._expire(timeout_s))
        try:
            yield process
        finally:
            if watching:
                watching.cancel()
                await asyncio.wait([watching])


async def start_process(
    agent: GuestAgent, argv: Sequence[str], *, env: Mapping[str, str] | None = None, input_data: bytes = b""
) -> Process:
    """Start a program that runs on when nobody looks. Its `pid` and `token` find it again, as long as its agent runs.

    Raises NoLiveOutput if the guest is not able to, and what `GuestAgent` raises.
    """
    _check(argv)
    return await _start_live(agent, argv, env, input_data, stdin=False, timeout_s=START_TIMEOUT_S)


async def boot_id_of(agent: GuestAgent) -> str:
    """Give what names this boot of the guest, "" where it does not tell. Raises what `GuestAgent` raises."""
    try:
        async with spool.opened(agent, "/proc/sys/kernel/random/boot_id", "r") as handle:
            data, _ = await spool.read(agent, handle)
    except CommandFailed:
        return ""
    return data.decode(errors="replace").strip()


async def _start(
    agent: GuestAgent,
    argv: Sequence[str],
    env: Mapping[str, str] | None,
    input_data: bytes,
    *,
    stdin: bool,
    timeout_s: float,
) -> Process:
    try:
        return await _start_live(agent, argv, env, input_data, stdin=stdin, timeout_s=timeout_s)
    except NoLiveOutput as why:
        process = await _start_captured(agent, argv, input_data, env, timeout_s)
        without_input = ", and its standard input is empty" if stdin else ""
        process.notice = f"{why}: the output comes at the end, at most 16 MiB of each stream{without_input}"
        return process


async def _start_live(
    agent: GuestAgent,
    argv: Sequence[str],
    env: Mapping[str, str] | None,
    input_data: bytes,
    *,
    stdin: bool,
    timeout_s: float,
) -> Process:
    await _check_readable(agent, timeout_s)
    token = spool.new_token()
    words = spool.wrapped(argv, token, with_input=stdin)
    try:
        pid = await programs.start(agent, words, input_data=input_data, env=env, timeout_s=timeout_s)
    except CommandFailed as error:
        raise NoLiveOutput(f"the guest has no shell that can be used ({error.desc})") from error
    process = Process(agent, pid, token)
    try:
        await _until_spooled(process, agent)
        if stdin:
            await process._open_input()
    except (AgentError, NoLiveOutput):
        await process._clean_up()
        raise
    return process


async def _check_readable(agent: GuestAgent, timeout_s: float) -> None:
    try:
        async with spool.opened(agent, "/dev/null", "r", timeout_s=timeout_s):
            pass
    except AgentFrozen:
        raise
    except (CommandUnavailable, CommandFailed) as error:
        raise NoLiveOutput(f"the guest's agent opens no files ({error.message})") from error


async def _until_spooled(process: Process, agent: GuestAgent) -> None:
    """Return once the shell has made the program's files, after which it becomes the program."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + CALL_TIMEOUT_S
    for pause_s in pauses():
        ended = await process.has_ended()
        try:
            async with spool.opened(agent, spool.path_of(process.token, "out"), "r"):
                return
        except CommandFailed as error:
            if process._was_begun:
                return  # and it has removed its files
            if ended and process.result:
                said = process.result.stderr.decode(errors="replace").strip()
                raise NoLiveOutput(f"the guest's shell cannot write to {spool.FOLDER} ({said})") from error
        if loop.time() >= deadline_s:
            raise process._unfinished(f"its shell did not open its files in {spool.FOLDER}")
        await asyncio.sleep(pause_s)


async def _start_captured(
    agent: GuestAgent,
    argv: Sequence[str],
    input_data: bytes = b"",
    env: Mapping[str, str] | None = None,
    timeout_s: float = CALL_TIMEOUT_S,
) -> Process:
    return Process(agent, await programs.start(agent, argv, input_data=input_data, env=env, timeout_s=timeout_s))


def _check(argv: Sequence[str]) -> None:
    if isinstance(argv, str) or not argv:
        raise ValueError("argv is a list of at least one word")
