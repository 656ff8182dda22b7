"""Copying through the real qemu-ga on a host socket; and what becomes of a copy when the agent, a fake one, lies."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import itertools
import os
import random
import shutil
import stat
import tarfile
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.contract.guest_agent import conftest
from tests.contract.guest_agent.conftest import TIMEOUT_S, QemuGa
from tests.framework.fake_agent import Answer, FakeAgent, Request, value
from vmherd.guest_agent import (
    AgentError,
    AgentFrozen,
    AgentUnresponsive,
    CommandFailed,
    GuestAgent,
    ProtocolError,
    file_handles,
    file_programs,
)
from vmherd.guest_agent.file_errors import FileChanged, FileMissing, FileUnsuitable
from vmherd.guest_agent.files import CHUNK_BYTES, FileDescription, FileDigest, describe, open_reader, open_writer

pytestmark = pytest.mark.anyio

FILE_COMMANDS = {f"guest-file-{verb}" for verb in ("open", "close", "read", "write", "seek", "flush")}
TOOLS = {"env", "stat", "sha256sum", "mv", "rm", "chmod", "chown", "readlink", "mkdir", "tar"}
SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7]
NOISE = random.Random(7).randbytes(max(SIZES))

Connect = Callable[..., Awaitable[GuestAgent]]


class Ga(QemuGa):
    """The real agent, which tells how many files it has open."""

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """A folder of "the guest", which is this host."""
    folder = tmp_path / "guest"
    folder.mkdir()
    return folder


@pytest.fixture
async def start_ga(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Ga]]]:
    async with AsyncExitStack() as stack:

        async def start(*, without: Collection[str] = (), blocked: Collection[str] = ()) -> Ga:
            """Start an agent that finds our tools in its PATH, and nothing else."""
            programs = tmp_path / "bin"
            programs.mkdir()
            for tool in TOOLS - set(without):
                (programs / tool).symlink_to(shutil.which(tool) or "")
            monkeypatch.setenv("PATH", str(programs))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmherd-")))
            ga = Ga(folder / "agent.sock", blocked=blocked, harmless=conftest._HARMLESS | FILE_COMMANDS)
            await ga.start()
            stack.push_async_callback(ga.stop)
            return ga

        yield start


@pytest.fixture
async def connect(start_ga: Callable[..., Awaitable[Ga]]) -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        async def connect(**setup: Collection[str]) -> GuestAgent:
            return await stack.enter_async_context(GuestAgent((await start_ga(**setup)).path))

        yield connect


@pytest.fixture
async def agent(connect: Connect) -> GuestAgent:
    return await connect()


async def read(agent: GuestAgent, path: Path, *, archive: bool = False) -> tuple[FileDescription, bytes, FileDigest]:
    async with asyncio.timeout(TIMEOUT_S), open_reader(agent, str(path), archive=archive) as reader:
        data = b"".join([chunk async for chunk in reader])
        return reader.description, data, await reader.finish()


async def write(agent: GuestAgent, path: Path, data: bytes, **wanted: int | bool) -> FileDigest:
    async with asyncio.timeout(TIMEOUT_S), open_writer(agent, str(path), **wanted) as writer:  # type: ignore[arg-type]
        await writer.write(data)
        return await writer.finish()


def archive_of(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What copies leave beside their targets bears our mark: others may run the same test."""
    numbers = itertools.count()
    monkeypatch.setattr(file_handles, "_new_name", lambda: f".vmherd-{os.getpid()}-{next(numbers)}")


def litter() -> list[Path]:
    return [path for folder in ("/tmp", "/var/tmp") for path in Path(folder).glob(f".vmherd-{os.getpid()}-*")]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("size_bytes", SIZES)
async def test_what_is_written_can_be_read(agent: GuestAgent, guest: Path, size_bytes: int) -> None:
    content = NOISE[:size_bytes]
    expected = FileDigest(size_bytes, hashlib.sha256(content).hexdigest(), verified=True)
    assert await write(agent, guest / "f", content, size_bytes=size_bytes) == expected
    description, data, digest = await read(agent, guest / "f")
    assert (data, digest) == (content, expected)
    modified_s = int((guest / "f").stat().st_mtime)
    assert description == FileDescription(str(guest / "f"), size_bytes=size_bytes, mode=0o644, modified_s=modified_s)


async def test_pieces_of_any_size_make_one_file(agent: GuestAgent, guest: Path) -> None:
    async with open_writer(agent, str(guest / "f")) as writer:
        start = 0
        for size_bytes in (0, 1, 3 * CHUNK_BYTES, 5, 0, 1):
            await writer.write(NOISE[start : start + size_bytes])
            start += size_bytes
        await writer.finish()
    assert (guest / "f").read_bytes() == NOISE[:start]


async def test_modes(agent: GuestAgent, guest: Path) -> None:
    file = guest / "f"
    for given, expected in ((None, 0o644), (0o4701, 0o4701), (None, 0o4701), (0, 0)):
        await write(agent, file, b"", **({} if given is None else {"mode": given}))
        assert mode_of(file) == expected
    assert (await describe(agent, str(file))).mode == 0


async def test_a_new_file_is_nobody_elses_until_it_is_whole(agent: GuestAgent, guest: Path) -> None:
    (guest / "f").write_text("old")
    async with open_writer(agent, str(guest / "f"), mode=0o666) as writer:
        await writer.write(NOISE)
        [unfinished] = names_in(guest) - {"f"}
        assert mode_of(guest / unfinished) == 0o600
        assert (guest / "f").read_text() == "old"
    assert names_in(guest) == {"f"}
    assert (guest / "f").read_text() == "old"  # it was left before `finish`


async def test_a_link_stays_a_link(agent: GuestAgent, guest: Path) -> None:
    (guest / "new\nline\n").touch()
    (guest / "link").symlink_to("new\nline\n")
    await write(agent, guest / "link", b"data")
    assert (guest / "link").is_symlink()
    assert (guest / "new\nline\n").read_bytes() == b"data"


async def test_bytes_that_do_not_match_what_was_announced(agent: GuestAgent, guest: Path) -> None:
    for size_bytes in (1, 3):
        with pytest.raises(FileChanged, match="announced"):
            await write(agent, guest / "f", b"ab", size_bytes=size_bytes)
    assert names_in(guest) == set()


async def test_a_folder_goes_as_an_archive(agent: GuestAgent, guest: Path) -> None:
    digest = await write(agent, guest / "in", archive_of("f", b"data"), archive=True)
    assert digest.verified
    assert (guest / "in" / "f").read_bytes() == b"data"
    description, data, digest = await read(agent, guest / "in", archive=True)
    assert description.is_folder
    assert digest.verified
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert sorted(tar.getnames()) == [".", "./f"]
    assert litter() == []


async def test_an_archive_changes_nothing_of_the_folder_it_goes_to(agent: GuestAgent, guest: Path) -> None:
    before = mode_of(guest)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        top = tarfile.TarInfo(".")
        top.type, top.mode = tarfile.DIRTYPE, before ^ 0o070
        tar.addfile(top)
    await write(agent, guest, file.getvalue(), archive=True)
    assert mode_of(guest) == before


async def test_files_of_another_kind(agent: GuestAgent, guest: Path) -> None:
    with pytest.raises(FileUnsuitable, match="neither a file nor a folder"):
        await read(agent, Path("/dev/zero"))
    with pytest.raises(FileUnsuitable, match="Not a regular file"):
        await write(agent, Path("/dev/null"), b"")
    with pytest.raises(FileUnsuitable, match="it is a folder"):
        await read(agent, guest)
    with pytest.raises(FileUnsuitable, match="not a folder"):
        await read(agent, Path("/etc/passwd"), archive=True)
    with pytest.raises(FileMissing, match="No such file"):
        await read(agent, guest / "none")
    with pytest.raises(FileMissing, match="No such file"):
        await write(agent, guest / "none" / "f", b"")
    with pytest.raises(FileMissing, match="No such file"):
        await write(agent, guest / "none" / "f", archive_of("f", b""), archive=True)


async def test_a_file_of_proc_has_no_size(agent: GuestAgent) -> None:
    description, data, digest = await read(agent, Path("/proc/version"))
    assert data.startswith(b"Linux version")
    assert (description.size_bytes, digest.verified) == (len(data), False)
    assert digest.notice == "not verified: the file has no size of its own"
    assert (await describe(agent, "/proc/version")).size_bytes is None


@pytest.mark.parametrize("change", ["grown", "cut", "another"])
async def test_a_file_that_changes_is_told(agent: GuestAgent, guest: Path, change: str) -> None:
    file = guest / "f"
    file.write_bytes(NOISE)
    new = {"grown": NOISE + b"more", "cut": b"", "another": NOISE[::-1]}[change]

    async def read_while_it_changes() -> None:
        async with open_reader(agent, str(file)) as reader:
            async for _ in reader:
                file.write_bytes(new)
            await reader.finish()

    with pytest.raises(FileChanged, match="changed while it was read"):
        await read_while_it_changes()


async def test_a_guest_without_sha256sum(connect: Connect, guest: Path) -> None:
    agent = await connect(without={"sha256sum"})
    digests = [
        await write(agent, guest / "f", b"data"),
        (await read(agent, guest / "f"))[2],
        await write(agent, guest / "folder", archive_of("f", b"data"), archive=True),
        (await read(agent, guest / "folder", archive=True))[2],
    ]
    assert {(digest.verified, digest.notice) for digest in digests} == {
        (False, "not verified: the guest has no sha256sum that its agent can run")
    }


@pytest.mark.parametrize("setup", [{"without": {"mv"}}, {"blocked": {"guest-exec"}}], ids=["no mv", "no guest-exec"])
async def test_a_guest_that_cannot_rename(connect: Connect, guest: Path, setup: Mapping[str, Collection[str]]) -> None:
    agent = await connect(**setup)
    digest = await write(agent, guest / "f", b"data", mode=0o600)
    assert (guest / "f").read_bytes() == b"data"
    assert digest.notice.startswith("written in place and not at once")
    assert digest.verified is ("without" in setup)
    assert ("its mode was not set" in digest.notice) is ("blocked" in setup)
    with pytest.raises(FileMissing):
        await write(agent, guest / "none" / "f", b"")


@pytest.mark.parametrize(
    "setup", [{"without": {"stat"}}, {"blocked": {"guest-exec"}}], ids=["no stat", "no guest-exec"]
)
async def test_a_guest_that_cannot_say_what_a_file_is(
    connect: Connect, guest: Path, setup: Mapping[str, Collection[str]]
) -> None:
    (guest / "f").write_bytes(NOISE)
    agent = await connect(**setup)
    description, data, digest = await read(agent, guest / "f")
    assert data == NOISE
    assert (description.size_bytes, description.mode, digest.verified) == (None, None, False)
    assert digest.notice.startswith("not verified: the guest has no stat")
    with pytest.raises(FileMissing):
        await read(agent, guest / "none")
    with pytest.raises(FileUnsuitable):
        await read(agent, guest)


async def test_a_guest_without_tar(connect: Connect, guest: Path) -> None:
    agent = await connect(without={"tar"})
    for copy in (read(agent, guest, archive=True), write(agent, guest, archive_of("f", b""), archive=True)):
        with pytest.raises(FileUnsuitable, match="takes a POSIX shell and tar"):
            await copy


async def test_an_archive_into_a_linked_folder_changes_nothing_of_it(agent: GuestAgent, guest: Path) -> None:
    (guest / "folder").mkdir(mode=0o700)
    (guest / "link").symlink_to("folder")
    await write(agent, guest / "link", archive_of("f", b"data"), archive=True)
    assert (guest / "folder" / "f").read_bytes() == b"data"
    assert mode_of(guest / "folder") == 0o700


async def test_room_for_an_archive_in_the_second_place(connect: Connect, tmp_path: Path, guest: Path) -> None:
    """Where the guest's /var/tmp is of no use."""
    agent = await connect(without={"mkdir"})
    mkdir = tmp_path / "bin" / "mkdir"
    mkdir.write_text(
        f'#!/bin/sh\ncase $1 in /var/tmp/*) exit 1;; esac\nexec {shutil.which("mkdir", path=os.defpath)} "$@"\n'
    )
    mkdir.chmod(0o755)
    await write(agent, guest / "folder", archive_of("f", b"data"), archive=True)
    assert (guest / "folder" / "f").read_bytes() == b"data"
    assert litter() == []


class Hooked(GuestAgent):
    """Does what a test wants before each call."""

    def __init__(self, path: Path, hook: Callable[[str, Mapping[str, object]], None]) -> None:
        super().__init__(path)
        self.hook = hook

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float) -> object:
        self.hook(command, arguments or {})
        return await super().execute(command, arguments, timeout_s=timeout_s)


@pytest.mark.parametrize("before", ["guest-file-open", "guest-file-write", "guest-file-close"])
@pytest.mark.parametrize("thing", ["link", "file", "fifo", "nothing"])
@pytest.mark.parametrize("without", [set(), {"sha256sum"}], ids=["", "no sha256sum"])
async def test_whoever_owns_the_folder_puts_something_in_place_of_the_new_file(
    start_ga: Callable[..., Awaitable[Ga]], tmp_path: Path, guest: Path, without: set[str], before: str, thing: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("of somebody else")
    victim.chmod(0o600)
    (guest / "f").write_text("old")

    def exchange(command: str, _: Mapping[str, object]) -> None:
        if command == before and not (guest / "stolen").exists():
            [new] = names_in(guest) - {"f"}
            (guest / new).rename(guest / "stolen")
            match thing:
                case "link":
                    (guest / new).symlink_to(victim)
                case "file":
                    (guest / new).hardlink_to(victim)
                case "fifo":
                    os.mkfifo(guest / new)

    async with Hooked((await start_ga(without=without)).path, exchange) as agent:
        with pytest.raises(AgentError):
            await write(agent, guest / "f", NOISE, mode=0o666)
    assert victim.read_text() == "of somebody else"
    assert mode_of(victim) == 0o600
    assert (guest / "f").read_text() == "old"
    assert names_in(guest) <= {"f", "stolen"}


async def test_a_program_that_could_not_be_started_is_not_one_that_is_missing(
    start_ga: Callable[..., Awaitable[Ga]], guest: Path
) -> None:
    """Else one failed fork would make a copy that is whole or not at all into one in place."""
    (guest / "f").write_text("old")

    def fail(command: str, _: Mapping[str, object]) -> None:
        if command == "guest-exec":
            raise CommandFailed("GenericError", "Failed to fork (Cannot allocate memory)", command=command, elapsed_s=0)

    async with Hooked((await start_ga()).path, fail) as agent:
        for copy in (write(agent, guest / "f", NOISE), read(agent, guest / "f")):
            with pytest.raises(CommandFailed, match="fork"):
                await copy
    assert (guest / "f").read_text() == "old"


class Freeze:
    """Lets an agent refuse calls as one whose file systems are frozen, from call number `at` on for `calls` of them."""

    def __init__(self, at: int, calls: int) -> None:
        self.at, self.end, self.count = at, at + calls, 0

    def __call__(self, command: str, _: Mapping[str, object]) -> None:
        self.count += 1
        if self.at <= self.count < self.end:
            raise AgentFrozen(f"{command}: frozen", command=command, elapsed_s=0)


@pytest.mark.parametrize("kind", ["read", "write"])
async def test_a_copy_goes_on_after_the_thaw(start_ga: Callable[..., Awaitable[Ga]], guest: Path, kind: str) -> None:
    (guest / "f").write_bytes(NOISE)
    freeze = Freeze(1 << 60, 0)
    async with Hooked((await start_ga()).path, freeze) as agent, asyncio.timeout(TIMEOUT_S):
        if kind == "read":
            async with open_reader(agent, str(guest / "f")) as reader:
                freeze.at, freeze.end = freeze.count + 1, freeze.count + 8
                assert b"".join([chunk async for chunk in reader]) == NOISE
                freeze.at, freeze.end = freeze.count + 1, freeze.count + 8
                assert (await reader.finish()).verified
        else:
            async with open_writer(agent, str(guest / "g")) as writer:
                freeze.at, freeze.end = freeze.count + 1, freeze.count + 8
                await writer.write(NOISE)
                freeze.at, freeze.end = freeze.count + 1, freeze.count + 8
                assert (await writer.finish()).verified
            assert (guest / "g").read_bytes() == NOISE
        assert freeze.count >= freeze.end


@pytest.mark.parametrize("kind", ["read", "write"])
async def test_a_freeze_that_does_not_end_ends_a_copy(
    start_ga: Callable[..., Awaitable[Ga]], guest: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_programs.thawed, "__kwdefaults__", {"timeout_s": 0.01})
    (guest / "f").write_bytes(NOISE)
    freeze = Freeze(1 << 60, 0)
    ga = await start_ga()
    idle = await open_files(ga)
    async with Hooked(ga.path, freeze) as agent, asyncio.timeout(TIMEOUT_S):

        async def copy() -> None:
            if kind == "read":
                async with open_reader(agent, str(guest / "f")) as reader:
                    freeze.at, freeze.end = 0, 1 << 60
                    async for _ in reader:
                        pass
            else:
                async with open_writer(agent, str(guest / "g")) as writer:
                    freeze.at, freeze.end = 0, 1 << 60
                    await writer.write(NOISE)
                    await writer.finish()

        with pytest.raises(AgentFrozen):
            await copy()
        freeze.end = 0
        await tidied_up(agent)
    assert names_in(guest) == {"f"}
    await until_open(ga, idle)


async def test_a_copy_that_waits_for_the_thaw_can_be_left(start_ga: Callable[..., Awaitable[Ga]], guest: Path) -> None:
    freeze = Freeze(1 << 60, 0)
    async with Hooked((await start_ga()).path, freeze) as agent, asyncio.timeout(TIMEOUT_S):
        async with open_writer(agent, str(guest / "g")) as writer:
            freeze.at, freeze.end = 0, 1 << 60
            await writer.write(NOISE[:CHUNK_BYTES])
        freeze.end = 0
        await tidied_up(agent)
    assert names_in(guest) == set()


async def tidied_up(agent: GuestAgent) -> None:
    """What could not be tidied up in a freeze has been after it."""
    await asyncio.gather(*agent._background)


class Interrupted(GuestAgent):
    """Ends a copy at one of its calls: see ENDS."""

    def __init__(self, path: Path, at: int, end: str) -> None:
        super().__init__(path)
        self.left = at
        self._end = end
        self._caller = asyncio.current_task()
        self._tidying: set[object] = set()

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float) -> object:
        words = arguments or {}
        tidies = (
            command == "guest-file-close"
            or words.get("path") == "rm"
            or "kill" in str(words.get("arg"))
            or words.get("pid") in self._tidying
        )
        counts = ENDS[self._end](command, tidies)
        self.left -= counts
        ends = counts and self.left == 0
        if ends and self._end == "failed":
            raise AgentUnresponsive("the test said so", command=command, elapsed_s=0)
        if ends and self._end == "frozen":
            raise AgentFrozen("the test said so", command=command, elapsed_s=0)
        if ends and self._end == "cancelled" and self._caller:
            self._caller.cancel()
        answer = await super().execute(command, arguments, timeout_s=timeout_s)
        if tidies and isinstance(answer, dict):
            self._tidying.add(answer.get("pid"))
        if ends and self._end == "lost":
            raise AgentUnresponsive("the test said so", command=command, elapsed_s=0, outcome_unknown=True)
        return answer


ENDS: dict[str, Callable[[str, bool], bool]] = {
    "cancelled": lambda command, tidies: True,
    "frozen": lambda command, tidies: True,
    "failed": lambda command, tidies: not tidies,  # nobody would tidy up then
    # It was done and its reply does not come. The agent keeps the pipes of a program whose process id nobody learns.
    "lost": lambda command, tidies: tidies and command != "guest-exec",
}
"""How a copy ends, and at which calls, of those that tidy up and of others."""


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", ["read", "write", "read a folder", "write a folder"])
async def test_a_copy_that_ends_anywhere_leaves_nothing(
    start_ga: Callable[..., Awaitable[Ga]], guest: Path, kind: str, end: str
) -> None:
    """Ends a copy at its first call to the agent, at its second, and so on until one goes through."""
    (guest / "f").write_bytes(NOISE)
    ga = await start_ga()
    copies: dict[str, Callable[[GuestAgent], Awaitable[object]]] = {
        "read": lambda agent: read(agent, guest / "f"),
        "write": lambda agent: write(agent, guest / "g", NOISE),
        "read a folder": lambda agent: read(agent, guest, archive=True),
        "write a folder": lambda agent: write(agent, guest / "folder", archive_of("f", NOISE), archive=True),
    }
    idle = await open_files(ga)
    for at in range(1, 100):

        async def copy(at: int = at) -> int:
            async with Interrupted(ga.path, at, end) as agent:
                try:
                    await copies[kind](agent)
                finally:
                    await tidied_up(agent)
                return agent.left

        left, *_ = await asyncio.gather(asyncio.create_task(copy()), return_exceptions=True)
        assert isinstance(left, int | asyncio.CancelledError | AgentError), left
        await eventually(lambda: names_in(guest) <= {"f", "g", "folder"}, f"after {at} calls")
        assert not (guest / "g").exists() or (guest / "g").read_bytes() == NOISE
        await eventually(lambda: litter() == [], f"after {at} calls")
        await until_open(ga, idle)
        if isinstance(left, int) and left > 0:
            assert at > (1 if end == "lost" else 5)
            return
    raise AssertionError("it never went through")


async def eventually(is_so: Callable[[], bool], what: str) -> None:
    """A program whose start was not confirmed may still be at work."""
    deadline_s = asyncio.get_running_loop().time() + TIMEOUT_S
    while not is_so():
        assert asyncio.get_running_loop().time() < deadline_s, what
        await asyncio.sleep(0.005)


async def open_files(ga: Ga) -> int:
    async with GuestAgent(ga.path) as agent:
        await agent.ping(timeout_s=TIMEOUT_S)  # by now it has forgotten the client before
        return ga.open_files()


async def until_open(ga: Ga, count: int) -> None:
    """The agent closes the pipes of a program when that has ended, and tells nobody."""
    async with asyncio.timeout(TIMEOUT_S):
        while await open_files(ga) != count:
            pass


def chunks(*answers: dict[str, object]) -> Answer:
    """The answers to one `guest-file-read` after the other, the last one again and again."""
    left = list(answers)

    async def answer(request: Request) -> bytes:
        return request.success(left.pop(0) if len(left) > 1 else left[0])

    return answer


def piece(data: bytes, *, eof: bool = False) -> dict[str, object]:
    return {"count": len(data), "buf-b64": base64.b64encode(data).decode(), "eof": eof}


@pytest.fixture
async def liar() -> AsyncIterator[FakeAgent]:
    """An agent that runs no programs and has one file, of which a test says what it holds."""
    with tempfile.TemporaryDirectory(prefix="vmherd-") as folder:
        async with FakeAgent(Path(folder) / "agent.sock", blocked={"guest-exec"}) as fake:
            fake.answers["guest-file-open"] = value(1000)
            fake.answers["guest-file-close"] = value({})
            yield fake


@pytest.mark.parametrize(
    "answer",
    [
        {"count": 5, "buf-b64": "AAAA", "eof": True},
        {"count": 3, "buf-b64": "A*AA", "eof": True},
        {"count": 0, "eof": False},
        {"count": "3", "buf-b64": "AAAA", "eof": True},
        {"buf-b64": "AAAA", "eof": True},
        {"count": 3, "buf-b64": "AAAA"},
        piece(bytes(CHUNK_BYTES + 1)),
        [],
        None,
    ],
)
async def test_nonsense_in_place_of_a_chunk(liar: FakeAgent, answer: object) -> None:
    liar.answers["guest-file-read"] = value(answer)
    async with GuestAgent(liar.path) as agent:
        with pytest.raises(ProtocolError, match="guest-file-read"):
            await read(agent, Path("/f"))
    assert liar.asked()[-1] == "guest-file-close"


@pytest.mark.parametrize("handle", [{}, "1000", True, 1.5, None])
async def test_nonsense_in_place_of_a_handle(liar: FakeAgent, handle: object) -> None:
    liar.answers["guest-file-open"] = value(handle)
    async with GuestAgent(liar.path) as agent:
        with pytest.raises(ProtocolError, match="guest-file-open"):
            await read(agent, Path("/f"))


async def test_a_chunk_that_was_written_in_part(liar: FakeAgent) -> None:
    liar.answers["guest-file-write"] = value({"count": 3, "eof": False})
    async with GuestAgent(liar.path) as agent:
        with pytest.raises(ProtocolError, match="only a part"):
            await write(agent, Path("/f"), b"data")


async def test_no_more_than_one_chunk_is_read_ahead(liar: FakeAgent) -> None:
    liar.answers["guest-file-read"] = chunks(piece(bytes(CHUNK_BYTES)))
    async with GuestAgent(liar.path) as agent, open_reader(agent, "/f") as reader:
        chunks_ = aiter(reader)
        for taken in range(1, 5):
            await anext(chunks_)
            async with asyncio.timeout(TIMEOUT_S):
                while liar.asked().count("guest-file-read") <= taken:
                    await agent.ping(timeout_s=TIMEOUT_S)
            await agent.ping(timeout_s=TIMEOUT_S)
            assert liar.asked().count("guest-file-read") == taken + 1
        await chunks_.aclose()
