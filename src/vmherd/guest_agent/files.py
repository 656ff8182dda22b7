"""Copying files out of a guest and into it, and folders as tar archives.

::

    async with open_reader(agent, "/etc/hosts") as reader:
        print(reader.description.size_bytes)
        async for chunk in reader:
            file.write(chunk)
        print((await reader.finish()).sha256)

    async with open_writer(agent, "/etc/motd", mode=0o644) as writer:
        await writer.write(b"Hello")
        await writer.finish()

A file of any size takes the memory of a few chunks. The agent works on the next chunk while the caller has this one,
and takes other calls in between. A new file is written beside its target, and gets its name once it is whole and the
guest has computed the same SHA-256; a writer that is left before `finish` leaves nothing behind. What a guest lacks the
programs for is left out, and a notice says so.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import stat
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from vmherd.guest_agent import file_programs
from vmherd.guest_agent.agent import GuestAgent
from vmherd.guest_agent.errors import CommandFailed
from vmherd.guest_agent.file_errors import FileChanged, FileUnsuitable, explained
from vmherd.guest_agent.file_handles import Handle, Place, archive_for, beside, opened, tidy
from vmherd.guest_agent.file_programs import Facts, thawed
from vmherd.guest_agent.holding import uninterrupted

CHUNK_BYTES = 256 << 10
"""What the agent reads or writes at a time. Others wait for one at most; larger ones gain little, or are slower."""

_READABLE = {stat.S_IFREG, stat.S_IFBLK, stat.S_IFDIR}
"""To open a FIFO or a terminal would stop the whole agent until the other side is there."""


_UNVERIFIED = "not verified: the guest has no sha256sum that its agent can run"
_IN_PLACE = "written in place and not at once: the guest has no POSIX shell with mv and stat that its agent can run"
_OWNERLESS = "the owner of the file that was there, and its mode if none was given, could not be kept"


@dataclass(frozen=True, slots=True)
class FileDescription:
    """What a file of the guest is.

    `size_bytes` is None for archives and where it is not known beforehand, as in /proc; `mode` (permission bits) and
    `modified_s` (since 1970) are None where the guest cannot tell. `notice` says, for people, what will not be done.
    """

    path: str
    is_folder: bool = False
    size_bytes: int | None = None
    mode: int | None = None
    modified_s: int | None = None
    notice: str = ""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What was copied: bytes, their SHA-256 in hexadecimal, and whether the guest computed the same.

    `notice` says, for people, what was not done as asked.
    """

    size_bytes: int
    sha256: str
    verified: bool
    notice: str = ""


async def describe(agent: GuestAgent, path: str) -> FileDescription:
    """What is at `path` in the guest, without reading it.

    Raises FileError and its kinds, and what `GuestAgent` raises.
    """
    return _described(path, await file_programs.look(agent, path))


@asynccontextmanager
async def open_reader(agent: GuestAgent, path: str, *, archive: bool = False) -> AsyncIterator[FileReader]:
    """Read the file at `path`, or with `archive` the folder there as a tar archive of what is in it.

    Raises FileError and its kinds, and what `GuestAgent` raises.
    """
    facts = await file_programs.look(agent, path)
    description = _described(path, facts)
    if facts and description.is_folder is not archive:
        why = "not a folder" if archive else "it is a folder, which comes as an archive (`-r` of `cp`)"
        raise FileUnsuitable(f"{path}: {why}", path=path, command="guest-file-open")
    async with AsyncExitStack() as stack:
        if archive:
            reader = await _archived(agent, stack, replace(description, is_folder=True))
        else:
            reader = FileReader(agent, await stack.enter_async_context(opened(agent, path, "r")), description, facts)
        stack.push_async_callback(reader._leave)
        await reader._begin()
        yield reader


async def _archived(agent: GuestAgent, stack: AsyncExitStack, description: FileDescription) -> FileReader:
    place = await stack.enter_async_context(archive_for(agent, description.path))
    sha256, complaint = await file_programs.pack(agent, description.path, place.path)
    handle = await stack.enter_async_context(opened(agent, place.path, "r"))
    await tidy(agent, place)  # what is open can be read without its name, and is gone even if we are killed
    notice = f"some of it changed while it was read: {complaint}" if complaint else ""
    return FileReader(agent, handle, replace(description, notice=notice), None, known_sha256=sha256)


class FileReader:
    """A file that is being read: iterate over it, then `finish`. `description` says what it is."""

    def __init__(
        self,
        agent: GuestAgent,
        handle: Handle,
        description: FileDescription,
        facts: Facts | None,
        known_sha256: str | None = None,
    ) -> None:
        self.description = description
        self._agent = agent
        self._handle = handle
        self._facts = facts
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._next: asyncio.Task[tuple[bytes, bool]] | None = None
        self._theirs: asyncio.Task[str | None] | None = None
        self._known_sha256 = known_sha256

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        """Give the chunks. Raises FileChanged if there is more than the description said, and `GuestAgent`'s errors."""
        while self._next:
            data, at_end = await asyncio.shield(self._next)
            self._next = None if at_end else asyncio.create_task(self._read())
            self._hash.update(data)
            self._size_bytes += len(data)
            expected_bytes = self.description.size_bytes
            if expected_bytes is not None and (
                self._size_bytes > expected_bytes or (at_end and self._size_bytes < expected_bytes)
            ):
                raise self._changed(f"it had {expected_bytes} bytes, and has another size now")
            if data:
                yield data

    async def finish(self) -> FileDigest:
        """What was read, compared with what the guest has; the iteration has to be over.

        Raises FileChanged if the file changed while it was read, and what `GuestAgent` raises.
        """
        ours = self._hash.hexdigest()
        theirs = self._known_sha256
        if self._theirs:
            theirs = await self._theirs
            now = await thawed(lambda: file_programs.look(self._agent, self.description.path))
            if now is None or self._facts is None or now.version != self._facts.version:
                raise self._changed("it has another size or time of change now")
        if theirs not in (None, ours):
            raise self._changed("the guest computes another SHA-256 than we do")
        notice = self.description.notice
        if theirs is None and not notice:
            notice = _UNVERIFIED
        return FileDigest(self._size_bytes, ours, theirs is not None, notice)

    async def _begin(self) -> None:
        """Read the first chunk, which shows whether the file is as large as it says, and begin to check the file."""
        self._next = asyncio.create_task(self._read())
        data, at_end = await asyncio.shield(self._next)
        if self.description.is_folder:
            return
        said_bytes = self._facts.size_bytes if self._facts and self._facts.kind == stat.S_IFREG else -1
        if len(data) == said_bytes or (len(data) < said_bytes and not at_end):
            self.description = replace(self.description, size_bytes=said_bytes)
            # It runs beside the reading, so a guest with a second processor needs no time for it.
            computing = thawed(lambda: file_programs.sha256(self._agent, self.description.path))
            self._theirs = asyncio.create_task(computing)
        else:
            # Files of /proc and /sys, and devices, are made as they are read, each time anew.
            size_bytes = len(data) if at_end else None
            notice = self.description.notice or "not verified: the file has no size of its own"
            self.description = replace(self.description, size_bytes=size_bytes, notice=notice)

    async def _read(self) -> tuple[bytes, bool]:
        try:
            return await self._handle.read(CHUNK_BYTES)
        except CommandFailed as error:
            raise explained(error, self.description.path) from error

    async def _leave(self) -> None:
        await uninterrupted(_ended(self._next))
        await uninterrupted(_ended(self._theirs))

    def _changed(self, why: str) -> FileChanged:
        path = self.description.path
        return FileChanged(f"{path}: it changed while it was read: {why}", path=path, command="guest-file-read")


@asynccontextmanager
async def open_writer(
    agent: GuestAgent, path: str, *, mode: int | None = None, archive: bool = False, size_bytes: int | None = None
) -> AsyncIterator[FileWriter]:
    """Write the file at `path`, or with `archive` unpack a tar archive into the folder there, made where it is missing.

    `mode` are permission bits, by default those of the file that is replaced, or 0644. `size_bytes` is how much will
    come, where that is known. Raises FileError and its kinds, and what `GuestAgent` raises.
    """
    async with AsyncExitStack() as stack:
        place = await stack.enter_async_context(archive_for(agent, path) if archive else beside(agent, path))
        # To open for "w" would empty what somebody has put in the place of the new file.
        handle = await stack.enter_async_context(opened(agent, place.path, "r+" if place.identity else "w"))
        if place.identity and (await handle.read(1))[0]:
            raise file_programs.exchanged(path)
        writer = FileWriter(agent, handle, place, mode=mode, archive=archive, size_bytes=size_bytes)
        try:
            yield writer
        finally:
            await uninterrupted(_ended(writer._last))


class FileWriter:
    """A file that is being written: `write` as often as you like, then `finish`."""

    def __init__(
        self,
        agent: GuestAgent,
        handle: Handle,
        place: Place,
        *,
        mode: int | None,
        archive: bool,
        size_bytes: int | None,
    ) -> None:
        self._agent = agent
        self._handle = handle
        self._place = place
        self._mode = mode
        self._archive = archive
        self._expected_bytes = size_bytes
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._rest = bytearray()
        self._last: asyncio.Task[None] | None = None

    async def write(self, data: bytes) -> None:
        """Take the next bytes; returns when no more than one chunk of them is on its way.

        Raises FileError and its kinds, also for an earlier chunk, and what `GuestAgent` raises.
        """
        self._hash.update(data)
        self._size_bytes += len(data)
        if self._expected_bytes is not None and self._size_bytes > self._expected_bytes:
            raise self._other_size()
        self._rest += data
        while len(self._rest) >= CHUNK_BYTES:
            await self._send(bytes(self._rest[:CHUNK_BYTES]))
            del self._rest[:CHUNK_BYTES]

    async def finish(self) -> FileDigest:
        """Give the file its name, or unpack the archive, after the guest has checked it.

        Raises FileError and its kinds, and what `GuestAgent` raises.
        """
        if self._expected_bytes not in (None, self._size_bytes):
            raise self._other_size()
        if self._rest:
            await self._send(bytes(self._rest))
        await self._sent()
        try:
            await self._handle.close()
        except CommandFailed as error:
            raise explained(error, self._place.target) from error
        notices, verified = await thawed(lambda: self._complete(self._hash.hexdigest()))
        if not verified:
            notices.append(_UNVERIFIED)
        return FileDigest(self._size_bytes, self._hash.hexdigest(), verified, "; ".join(notices))

    async def _complete(self, ours: str) -> tuple[list[str], bool]:
        """Give the file its name; gives what was not done, and whether the guest has computed the SHA-256."""
        agent, place = self._agent, self._place
        if self._archive:
            return [], await file_programs.unpack(agent, place.path, place.target, ours)
        if place.path != place.target:
            told = await file_programs.commit(agent, place.path, place.target, place.identity, ours, mode=self._mode)
            place.litter = ""
            return [_OWNERLESS] if "ownerless" in told else [], "verified" in told
        notices = [_IN_PLACE]
        if self._mode is not None and not await file_programs.change_mode(agent, place.target, self._mode):
            notices.append("its mode was not set")
        theirs = await file_programs.sha256(agent, place.target)
        if theirs not in (None, ours):
            raise self._changed("the guest computes another SHA-256 than we do")
        return notices, theirs is not None

    async def _send(self, chunk: bytes) -> None:
        # This chunk is made ready while the agent still works on the one before.
        text = base64.b64encode(chunk).decode()
        await self._sent()
        self._last = asyncio.create_task(self._write(text, len(chunk)))

    async def _sent(self) -> None:
        if self._last:
            await asyncio.shield(self._last)

    async def _write(self, text: str, size_bytes: int) -> None:
        try:
            await self._handle.write(text, size_bytes)
        except CommandFailed as error:
            raise explained(error, self._place.target) from error

    def _other_size(self) -> FileChanged:
        return self._changed(f"{self._expected_bytes} bytes were announced, and {self._size_bytes} came")

    def _changed(self, why: str) -> FileChanged:
        path = self._place.target
        return FileChanged(f"{path}: {why}", path=path, command="guest-file-write")


async def _ended(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task and wait for its end; whoever wanted its outcome has asked for it."""
    if task:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()


def _described(path: str, facts: Facts | None) -> FileDescription:
    if facts is None:
        return FileDescription(path, notice="not verified: the guest has no stat that its agent can run")
    if facts.kind not in _READABLE:
        raise FileUnsuitable(f"{path}: neither a file nor a folder", path=path, command="guest-file-open")
    # A file without blocks is empty, or one of /proc and /sys that has no size of its own.
    size_bytes = facts.size_bytes if facts.kind == stat.S_IFREG and facts.blocks else None
    return FileDescription(path, facts.kind == stat.S_IFDIR, size_bytes, facts.mode, facts.modified_s)
