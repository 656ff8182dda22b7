"""Programs as people expect them, on the real agent: its own output files, its own processes."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import hashlib
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import aclosing
from pathlib import Path

import pytest

from tests.contract.guest_agent.conftest import TIMEOUT_S, Peer, QemuGa, StartPeer
from vmherd.guest_agent import (
    AgentFrozen,
    CommandFailed,
    CommandTimedOut,
    CommandUnfinished,
    GuestAgent,
    NoLiveOutput,
    Process,
    Stream,
    boot_id_of,
    follow,
    open_process,
    run,
    spool,
    start_process,
)

pytestmark = pytest.mark.anyio

BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
COMMANDS = {
    "guest-ping",
    "guest-sync",
    "guest-sync-delimited",
    "guest-info",
    "guest-fsfreeze-status",
    "guest-exec",
    "guest-exec-status",
    "guest-file-open",
    "guest-file-read",
    "guest-file-seek",
    "guest-file-close",
}
"""All that programs take."""


@pytest.fixture
async def start_real_peer() -> AsyncIterator[StartPeer]:
    """The fake opens no files, so this is for the real one alone."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*, blocked: Collection[str] = (), frozen: bool = False) -> Peer:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmherd-")))
            peer = QemuGa(folder / "agent.sock", blocked=blocked, frozen=frozen, harmless=COMMANDS)
            await peer.start()
            stack.push_async_callback(peer.stop)
            return peer

        yield start


@pytest.fixture
async def real_peer(start_real_peer: StartPeer) -> Peer:
    return await start_real_peer()


@pytest.fixture
async def agent(real_peer: Peer) -> AsyncIterator[GuestAgent]:
    async with GuestAgent(real_peer.path) as agent:
        yield agent


@pytest.fixture(autouse=True)
async def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """The guest is this host, where the files of others lie as well: so ours have a folder of their own."""
    folder = tmp_path / "spool"
    folder.mkdir()
    monkeypatch.setattr(spool, "FOLDER", str(folder))
    yield
    async with asyncio.timeout(TIMEOUT_S):
        while os.listdir(folder):  # noqa: ASYNC110  what removes them may outlive a caller that was cancelled
            await asyncio.sleep(0.01)


async def gather(process: Process) -> tuple[bytes, bytes]:
    found = {stream: bytearray() for stream in Stream}
    async for output in process.output():
        assert output.offset == len(found[output.stream])
        found[output.stream] += output.data
    return bytes(found[Stream.STDOUT]), bytes(found[Stream.STDERR])


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def command_lines() -> list[bytes]:
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may have ended since
            found.append(Path(path).read_bytes())
    return found


def modes_in(folder: str) -> dict[str, int]:
    """The permission bits of a folder and of what is in it; nothing where it is not there."""
    found = {}
    for path in (folder, *glob.glob(f"{folder}/*")):
        with contextlib.suppress(FileNotFoundError):  # the guest may be removing it right now
            found[path.removeprefix(folder).strip("/") or "."] = stat.S_IMODE(os.lstat(path).st_mode)
    return found


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while is_alive(pid):  # noqa: ASYNC110  nothing tells
            await asyncio.sleep(0.01)


async def test_output_comes_while_the_program_runs(agent: GuestAgent, tmp_path: Path) -> None:
    go = tmp_path / "go"
    script = f"echo first; while ! [ -e {go} ]; do sleep 0.01; done; echo second >&2; exit 3"
    seen = []
    async with asyncio.timeout(TIMEOUT_S), open_process(agent, ["sh", "-c", script]) as process:
        assert process.notice == ""
        async for output in process.output():
            seen.append((output.stream, output.offset, output.data))
            assert process.result is None or len(seen) == 2
            go.touch()
    assert seen == [(Stream.STDOUT, 0, b"first\n"), (Stream.STDERR, 0, b"second\n")]
    assert process.result
    assert (process.result.exit_code, process.result.signal) == (3, None)


async def test_output_beyond_what_the_agent_keeps_is_whole(agent: GuestAgent) -> None:
    script = "head -c 17000000 /dev/urandom | tee /dev/stderr | sha256sum"
    digest, size = hashlib.sha256(), 0
    stdout = b""
    async with open_process(agent, ["sh", "-c", script]) as process:
        async for output in process.output():
            if output.stream is Stream.STDERR:
                digest.update(output.data)
                size += len(output.data)
            else:
                stdout += output.data
    assert size == 17_000_000
    assert stdout.split()[0].decode() == digest.hexdigest()


async def test_every_byte_goes_both_ways(agent: GuestAgent) -> None:
    every_byte = bytes(range(256))
    async with open_process(agent, ["cat"], input_data=every_byte) as process:
        assert await gather(process) == (every_byte, b"")
    words = ["printf", "%s.", "", "a b", "$HOME", "'", '"', "\\", "*", "größer\n"]
    async with open_process(agent, words) as process:
        assert await gather(process) == (".a b.$HOME.'.\".\\.*.größer\n.".encode(), b"")


async def test_a_program_has_its_own_environment_and_umask(agent: GuestAgent) -> None:
    script = 'umask; echo "$#"; env'
    async with open_process(agent, ["/bin/sh", "-c", script], env={"PATH": "/usr/bin:/bin", "A": "b=c"}) as process:
        stdout, _ = await gather(process)
    mask = os.umask(0)
    os.umask(mask)
    own_mask, count, *variables = stdout.decode().splitlines()
    assert (int(own_mask, 8), count) == (mask, "0")
    assert {line.partition("=")[0] for line in variables} <= {"PATH", "A", "PWD", "OLDPWD", "SHLVL", "_"}
    assert "A=b=c" in variables


@pytest.mark.parametrize(("words", "code"), [(["/no/such/program"], 127), (["/etc/passwd"], 126)])
async def test_a_program_that_cannot_be_run_ends_as_in_a_shell(agent: GuestAgent, words: list[str], code: int) -> None:
    async with open_process(agent, words) as process:
        stdout, stderr = await gather(process)
    assert process.result
    assert (process.result.exit_code, stdout) == (code, b"")
    assert words[0].encode() in stderr


async def test_a_signal_is_told_from_an_exit_code(agent: GuestAgent) -> None:
    async with open_process(agent, ["sh", "-c", "echo on; exec sleep 60"]) as process:
        async for _ in process.output():
            assert await process.signal(signal.SIGUSR1)
    assert process.result
    assert (process.result.exit_code, process.result.signal) == (None, signal.SIGUSR1)
    assert not await process.signal(signal.SIGTERM)


async def test_what_a_program_leaves_behind_does_not_hold_its_end(agent: GuestAgent) -> None:
    async with open_process(agent, ["sh", "-c", "sleep 60 & echo $!"]) as process:
        async with asyncio.timeout(TIMEOUT_S):
            stdout, _ = await gather(process)
    os.kill(int(stdout), signal.SIGKILL)


async def test_a_program_that_is_left_ends_with_all_that_it_started(agent: GuestAgent) -> None:
    script = "(sleep 60 & echo $!; wait) & sleep 61 & echo $!; wait"
    pids: list[int] = []
    text = b""
    async with open_process(agent, ["sh", "-c", script]) as process, aclosing(process.output()) as outputs:
        async for output in outputs:
            text += output.data
            if text.count(b"\n") == 2:
                pids = [int(pid) for pid in text.split()]
                break
    assert len(pids) == 2
    for pid in (process.pid, *pids):
        await until_gone(pid)


async def test_a_program_that_ignores_sigterm_is_killed(agent: GuestAgent) -> None:
    async with open_process(agent, ["sh", "-c", "trap '' TERM; echo on; while :; do sleep 0.05; done"]) as process:
        async for _ in process.output():
            result = await process.end()
    assert result.signal == signal.SIGKILL


async def test_a_cancelled_caller_leaves_no_program_and_no_file(agent: GuestAgent) -> None:
    pid = asyncio.get_running_loop().create_future()

    async def call() -> None:
        async with open_process(agent, ["sleep", "60"], stdin=True) as process:
            pid.set_result(process.pid)
            await gather(process)

    task = asyncio.create_task(call())
    number = await pid
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_gone(number)


async def test_a_plain_run_that_is_cancelled_or_late_is_ended(agent: GuestAgent) -> None:
    with pytest.raises(CommandTimedOut, match=r"sleep did not end within 1 s and was ended") as caught:
        await run(agent, ["sleep", "60"], timeout_s=1)
    await until_gone(caught.value.pid)

    async with open_process(agent, ["sleep", "60"], timeout_s=1) as process:
        assert await gather(process) == (b"", b"")
    assert process.timed_out
    assert process.result
    assert process.result.signal == signal.SIGTERM


async def test_open_input_of_any_size_arrives_whole(agent: GuestAgent) -> None:
    data = os.urandom(5 << 20)
    async with open_process(agent, ["sha256sum"], stdin=True) as process:

        async def feed() -> None:
            await process.write(data[:1])
            await process.write(data[1:])
            await process.close_input()

        feeding = asyncio.create_task(feed())
        stdout, _ = await gather(process)
        await feeding
    assert stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


async def test_input_is_answered_while_it_is_open(agent: GuestAgent) -> None:
    async with asyncio.timeout(TIMEOUT_S), open_process(agent, ["cat"], stdin=True) as process:
        await process.write(b"one")
        async for output in process.output():
            if output.data == b"one":
                await process.write(b"two")
            else:
                assert (output.offset, output.data) == (3, b"two")
                await process.close_input()
    assert process.result
    assert process.result.exit_code == 0


async def test_input_that_nobody_reads_ends_with_the_program(agent: GuestAgent) -> None:
    async with (
        asyncio.timeout(TIMEOUT_S),
        open_process(agent, ["sh", "-c", "read line; exit 5"], stdin=True) as process,
    ):
        writing = asyncio.create_task(process.write(b"x\n" * (1 << 20)))
        await gather(process)
        await writing
    assert process.result
    assert process.result.exit_code == 5


async def test_without_a_shell_output_comes_at_the_end(agent: GuestAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmherd.guest_agent.spool.SHELL", "/no/such/shell")
    async with open_process(agent, ["printf", "a%s", "b"], stdin=True) as process:
        assert await gather(process) == (b"ab", b"")
    assert "no shell" in process.notice
    assert "at the end" in process.notice
    assert "standard input is empty" in process.notice
    with pytest.raises(NoLiveOutput, match="no shell"):
        await start_process(agent, ["true"])


async def test_without_a_place_for_files_output_comes_at_the_end(
    agent: GuestAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmherd.guest_agent.spool.FOLDER", "/proc/nowhere")
    async with open_process(agent, ["sh", "-c", "echo once; exit 4"]) as process:
        assert await gather(process) == (b"once\n", b"")
    assert process.result
    assert process.result.exit_code == 4
    assert "cannot write to /proc/nowhere" in process.notice


async def test_an_agent_that_opens_no_files_shows_output_at_the_end(start_real_peer: StartPeer) -> None:
    peer = await start_real_peer(blocked={"guest-file-open"})
    async with GuestAgent(peer.path) as agent, open_process(agent, ["echo", "hello"]) as process:
        assert await gather(process) == (b"hello\n", b"")
    assert "opens no files" in process.notice


async def test_a_program_runs_on_without_anybody_and_is_found_again(real_peer: Peer, tmp_path: Path) -> None:
    go = tmp_path / "go"
    script = f"echo first; while ! [ -e {go} ]; do sleep 0.01; done; echo second"
    async with GuestAgent(real_peer.path) as agent:
        started = await start_process(agent, ["sh", "-c", script])
    async with GuestAgent(real_peer.path) as agent:
        found = Process(agent, started.pid, started.token)
        assert not await found.has_ended()
        go.touch()
        assert await gather(found) == (b"first\nsecond\n", b"")
        assert found.result
        assert found.result.exit_code == 0

        async def ended() -> bool:
            return True

        late = [output.data async for output in follow(agent, found.token, ended, offsets={Stream.STDOUT: 6})]
        assert late == [b"second\n"]
        await found.remove_files()


async def test_another_agents_program_is_neither_signalled_nor_guessed_at(real_peer: Peer) -> None:
    async with GuestAgent(real_peer.path) as agent:
        started = await start_process(agent, ["sh", "-c", "echo begun; exec sleep 60"])
        async with aclosing(started.output()) as outputs:
            assert (await anext(outputs)).data == b"begun\n"  # its shell has nothing more to tell the agent
    await real_peer.restart()
    async with GuestAgent(real_peer.path) as agent:
        found = Process(agent, started.pid, started.token)
        with pytest.raises(CommandUnfinished, match="end was not seen"):
            await found.has_ended()
        with pytest.raises(CommandUnfinished):
            await found.signal(signal.SIGKILL)
        assert is_alive(started.pid)
        os.kill(started.pid, signal.SIGKILL)
        await found.remove_files()


async def test_the_guests_boot_has_a_name(agent: GuestAgent) -> None:
    assert await boot_id_of(agent) == BOOT_ID


@pytest.fixture(params=["sh", "busybox"])
def shell(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell of this host, and that of small guests."""
    link = tmp_path / "sh"
    program = shutil.which(request.param)
    assert program, f"{request.param} is missing"
    link.symlink_to(program)
    monkeypatch.setattr("vmherd.guest_agent.spool.SHELL", str(link))


@pytest.mark.usefixtures("shell")
async def test_a_program_may_open_its_own_output(agent: GuestAgent) -> None:
    script = "echo 1; echo 2 >/dev/stdout; echo 3; echo a >&2; echo b >/dev/stderr; echo c >&2; cat"
    async with open_process(agent, ["sh", "-c", script], stdin=True) as process:
        assert process.notice == ""
        await process.write(b"4\n")
        await process.close_input()
        assert await gather(process) == (b"1\n2\n3\n4\n", b"a\nb\nc\n")
        assert process.result
        assert (process.result.stdout, process.result.stderr) == (b"", b"")


async def test_output_that_the_guest_has_no_room_for_is_told(agent: GuestAgent, tmp_path: Path) -> None:
    full = tmp_path / "cat"  # as it ends when /tmp is full
    full.write_text("#!/bin/sh\nexec dd of=/dev/full\n")
    full.chmod(0o755)
    async with open_process(agent, ["echo", "important"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}) as process:
        with pytest.raises(CommandFailed, match="output is lost: the guest had no room"):
            await gather(process)


@pytest.mark.usefixtures("shell")
async def test_a_program_has_no_children_and_no_files_of_ours(agent: GuestAgent) -> None:
    script = "wait; ls /proc/$$/fd; cat /proc/$$/task/$$/children"
    async with open_process(agent, ["sh", "-c", script]) as process:
        stdout, _ = await gather(process)
    descriptors = [int(word) for word in stdout.split()[:3]]
    assert descriptors == [0, 1, 2]
    assert all(int(word) >= 10 for word in stdout.split()[3:]), "3 to 9 are the program's"


async def test_nobody_else_can_put_files_among_those_of_a_program(
    agent: GuestAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_process(agent, ["sleep", "60"], stdin=True) as process:
        modes = modes_in(spool.folder_of(process.token))
        assert modes["."] == 0o700
        assert {name: mode for name, mode in modes.items() if mode & 0o077} == {}

    monkeypatch.setattr(spool, "FOLDER", str(tmp_path))
    monkeypatch.setattr(spool, "new_token", lambda: "guessed")
    (tmp_path / ".vmherd-guessed").mkdir()
    async with open_process(agent, ["echo", "hello"]) as process:
        assert await gather(process) == (b"hello\n", b"")
    assert "cannot write to" in process.notice


async def test_a_program_that_removes_its_files_runs_once(
    agent: GuestAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "FOLDER", str(tmp_path))
    told = tmp_path / "told"
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            words = ["/bin/sh", "-c", f"rm -rf {tmp_path}/.vmherd-*; echo on >>{told}"]
            process = await stack.enter_async_context(open_process(agent, words))
            assert process.notice == ""
            await process.wait(timeout_s=TIMEOUT_S)
    assert told.read_text() == "on\n" * 5


async def test_neither_output_waits_for_the_other(agent: GuestAgent) -> None:
    async with open_process(agent, ["sh", "-c", "head -c 1000000 /dev/zero; echo on >&2"]) as process:
        await process.wait(timeout_s=TIMEOUT_S)
        streams = [output.stream async for output in process.output()]
    assert Stream.STDERR in streams[:2]
    assert len(streams) > 10


@pytest.mark.usefixtures("shell")
async def test_input_that_does_not_arrive_is_told(agent: GuestAgent) -> None:
    async with open_process(agent, ["sleep", "60"], stdin=True) as process:
        os.unlink(spool.path_of(process.token, "in"))
        with pytest.raises(CommandUnfinished, match="some of its input is lost"):
            await process.write(b"x")
        assert "in" not in modes_in(spool.folder_of(process.token))


class Frozen(GuestAgent):
    """An agent whose file systems can be frozen; to freeze those of this host is no good idea."""

    frozen = False

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float) -> object:
        if self.frozen:
            raise AgentFrozen(f"{command}: frozen", command=command, elapsed_s=0)
        return await super().execute(command, arguments, timeout_s=timeout_s)


async def test_what_a_freeze_keeps_is_gone_after_the_thaw(real_peer: Peer) -> None:
    async with Frozen(real_peer.path) as agent:
        async with open_process(agent, ["sleep", "60"], stdin=True) as process:
            agent.frozen = True
        assert is_alive(process.pid)
        agent.frozen = False
        await until_gone(process.pid)
        async with asyncio.timeout(TIMEOUT_S):
            while modes_in(spool.folder_of(process.token)):  # noqa: ASYNC110  nothing tells
                await asyncio.sleep(0.01)


class Interrupted(GuestAgent):
    """Cancels its caller at one of its calls."""

    def __init__(self, path: Path, at: int) -> None:
        super().__init__(path)
        self.left = at
        self._caller = asyncio.current_task()

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float) -> object:
        self.left -= 1
        if self.left == 0 and self._caller:
            self._caller.cancel()
        return await super().execute(command, arguments, timeout_s=timeout_s)


async def test_a_caller_cancelled_at_any_call_leaves_nothing(real_peer: Peer) -> None:
    marker = f"60.{os.getpid()}"

    async def call(at: int) -> int:
        async with Interrupted(real_peer.path, at) as agent:
            async with open_process(agent, ["sh", "-c", f"read line; exec sleep {marker}"], stdin=True) as process:
                await process.write(b"on\n")
                await process.signal(signal.SIGTERM)
                await gather(process)
            return agent.left

    for at in range(1, 100):
        (left,) = await asyncio.gather(asyncio.create_task(call(at)), return_exceptions=True)
        async with asyncio.timeout(TIMEOUT_S):  # a program that was killed may take a moment to end
            while [line for line in command_lines() if marker.encode() in line]:  # noqa: ASYNC110  nothing tells
                await asyncio.sleep(0.01)
        if isinstance(left, int) and left > 0:
            assert at > 15
            return
        assert isinstance(left, asyncio.CancelledError | int), left
    raise AssertionError("it never went through")
