"""What copying needs of the guest's own programs: what a file is, its SHA-256, a name for it at the end, archives.

The agent can open, read and write, and nothing else. Each script is one start of a shell, which is what costs.
"""

from __future__ import annotations

import asyncio
import re
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vmherd.guest_agent import programs
from vmherd.guest_agent.agent import GuestAgent
from vmherd.guest_agent.errors import AgentFrozen, CommandFailed, CommandUnavailable, CommandUnfinished
from vmherd.guest_agent.file_errors import FileChanged, FileUnsuitable, refuse
from vmherd.guest_agent.holding import eventually, held
from vmherd.guest_agent.process import Process
from vmherd.guest_agent.programs import CommandResult, pauses

T = TypeVar("T")

CALL_TIMEOUT_S = 30.0
"""How long one answer of the agent may take, or a thaw; a copy as a whole may take any time."""

_TIME_MAX_S = 62_135_596_800
"""The year 1 is as far before 1970: beyond that no calendar of ours goes."""

_NOT_THERE = 127
"""The exit code of `env` and of shells for a program that they do not find."""

_CANNOT_RUN = re.compile(
    r"Failed to execute child process.*\((No such file or directory|Permission denied|Exec format error)\)", re.DOTALL
)
"""What the agent says of a program that the guest does not have; whatever else goes wrong may go well the next time."""

_SHA256 = re.compile(rb"\\?([0-9a-f]{64})\b")  # a backslash tells that the name behind it is escaped

_COMMON = r"""
LC_ALL=C
export LC_ALL
say() { printf '%s\n' "$1" >&2; exit 1; }
has() { command -v "$1" >/dev/null; }
"""

# The new file is made with the mode 0600 before anything is in it: the agent would make it for all to write. Whoever
# owns the folder can put something else in its place later, so its identity is taken from the descriptor. What a link
# leads to is replaced, not the link. Its last character keeps $( ) from cutting off the end of a name.
_PREPARE = (
    _COMMON
    + r"""
has mv && has rm && has chmod || exit 127
target=$1
if [ -L "$target" ]; then
    target=$(readlink -f -- "$1" && printf x) || say "No such file or directory"
    target=${target%??}
fi
[ ! -d "$target" ] || say "Is a directory"
[ ! -e "$target" ] || [ -f "$target" ] || say "Not a regular file"
folder=${target%/*}
[ -e "${folder:-/}" ] || say "No such file or directory"
[ -d "${folder:-/}" ] || say "Not a directory"
umask 077
set -C
exec 3>"$folder/$2" || exit
identity=$(stat -Lc %d:%i /proc/self/fd/3) || { rm -f -- "$folder/$2"; exit 127; }
printf '%s\n%s/' "$identity" "$target"
"""
)

# Nothing is done by the new file's name until it is renamed: only what is open is known to be the file that we made. A
# change of the owner clears special mode bits, so the mode comes after it.
_COMMIT = (
    _COMMON
    + r"""
new=$1 target=$2 mode=$4
[ -f "$new" ] || exit 4
exec 3<"$new" || exit
[ "$(stat -Lc %d:%i /proc/self/fd/3)" = "$5" ] || exit 4
if has sha256sum; then
    sum=$(sha256sum <&3)
    [ "${sum%% *}" = "$3" ] || exit 3
fi
if [ -f "$target" ]; then
    if facts=$(stat -c '%u:%g %a' -- "$target" 2>/dev/null) && chown "${facts% *}" /proc/self/fd/3 2>/dev/null; then
        mode=${mode:-${facts#* }}
    else
        echo ownerless
    fi
fi
chmod "${mode:-644}" /proc/self/fd/3 || exit
mv -fT -- "$new" "$target" 2>/dev/null || { [ ! -d "$target" ] && mv -f -- "$new" "$target"; } || exit
has sha256sum && echo verified
exit 0
"""
)
_DAMAGED = 3
_EXCHANGED = 4

# Where much has room: /tmp is in memory on many systems.
_MAKE_SPACE = (
    _COMMON
    + r"""
has rm && has tar || exit 127
umask 077
folder=/var/tmp
mkdir "$folder/$1" 2>/dev/null || { folder=/tmp; mkdir "$folder/$1"; } || exit
printf '%s' "$folder/$1"
"""
)

# Wherever the scripts above may have put something of this name.
_FORGET = (
    _COMMON
    + r"""
target=$(readlink -f -- "$1" && printf x)
target=${target%??}
rm -rf -- "${1%/*}/$2" "${target%/*}/$2" "/var/tmp/$2" "/tmp/$2"
"""
)

_PACK = (
    _COMMON
    + r"""
tar -cf "$2" -C "$1" .
code=$?
[ -e "$2" ] || exit
has sha256sum && sha256sum <"$2"
exit $code
"""
)

# An archive says what mode its top has, which is not for a folder that was there before. The shell goes into the
# folder, so that all is done to the same one whatever becomes of its name.
_UNPACK = (
    _COMMON
    + r"""
if has sha256sum; then
    sum=$(sha256sum <"$1")
    [ "${sum%% *}" = "$3" ] || exit 3
fi
kept=
if [ -d "$2" ]; then
    cd -- "$2" || exit
    kept=$(stat -c %a . 2>/dev/null)
else
    mkdir -- "$2" && cd -- "$2" || exit
fi
tar -xpof "$1"
code=$?
[ "$kept" ] && chmod "$kept" .
[ $code = 0 ] || exit $code
has sha256sum && echo verified
exit 0
"""
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the guest's `stat` says of a file. `modified_s` counts from 1970, and `blocks` what it takes on the disk."""

    kind: int
    mode: int
    size_bytes: int
    blocks: int
    modified_s: int

    @property
    def version(self) -> tuple[int, int]:
        """What is another one after most changes of the content."""
        return self.size_bytes, self.modified_s


async def thawed(call: Callable[[], Awaitable[T]], *, timeout_s: float = CALL_TIMEOUT_S) -> T:
    """Give what a call gives, made again while the guest's file systems are frozen: what is refused was not done.

    Raises what the call raises; AgentFrozen if they are not thawed in time.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    for pause_s in pauses():
        try:
            return await call()
        except AgentFrozen:
            if loop.time() > deadline_s:
                raise
        await asyncio.sleep(pause_s)
    raise AssertionError("the pauses have no end")


async def completed(agent: GuestAgent, argv: Sequence[str]) -> CommandResult | None:
    """Run a program to its end, however long that takes; None if the guest has no such program or runs none.

    It is ended if the caller leaves. Raises what `GuestAgent` raises; AgentFrozen and CommandFailed if it was not
    started.
    """
    try:
        async with held(_start(agent, argv), lambda process: eventually(agent, lambda: _end(process))) as process:
            for pause_s in pauses():
                await asyncio.sleep(pause_s)
                if await process.has_ended(timeout_s=CALL_TIMEOUT_S):
                    break
    except AgentFrozen:
        raise
    except CommandUnavailable:
        return None
    except CommandFailed as error:
        if not _CANNOT_RUN.search(error.desc):
            raise
        return None
    result = process.result
    return None if result is None or result.exit_code == _NOT_THERE else result


async def look(agent: GuestAgent, path: str) -> Facts | None:
    """What is at `path`, None where the guest cannot tell. Raises FileError and its kinds."""
    result = await completed(agent, ["env", "LC_ALL=C", "stat", "-L", "-c", "%f %s %b %Y", "--", path])
    if result is None:
        return None
    if result.exit_code != 0:
        refuse(_said(result), path)
    try:
        raw_mode, *numbers = result.stdout.split()
        bits, (size_bytes, blocks, modified_s) = int(raw_mode, 16), map(int, numbers)
        if not (0 <= size_bytes < 1 << 63 and abs(modified_s) < _TIME_MAX_S):
            return None
        return Facts(stat.S_IFMT(bits), stat.S_IMODE(bits), size_bytes, blocks, modified_s)
    except ValueError:
        return None  # a `stat` that means something else by its options


async def sha256(agent: GuestAgent, path: str) -> str | None:
    """The SHA-256 of a file as the guest computes it, in hexadecimal; None where it cannot."""
    return _sha256_in(await completed(agent, ["sha256sum", "--", path]))


async def prepare(agent: GuestAgent, path: str, name: str) -> tuple[str, str, str] | None:
    """Make an empty file of this name beside the file at `path`; None where the guest lacks the programs for it.

    Gives the path of the new file, the one that it is to get, and its identity. Raises FileError and its kinds.
    """
    result = await _script(agent, _PREPARE, path, name)
    if result is None:
        return None
    if result.exit_code != 0:
        refuse(_said(result), path)
    try:
        identity, _, target = result.stdout.decode().removesuffix("/").partition("\n")
    except UnicodeDecodeError as error:
        why = "it is a link to a name that is not UTF-8, which the agent's protocol cannot carry"
        raise FileUnsuitable(f"{path}: {why}", path=path, command="guest-exec") from error
    return f"{target.rpartition('/')[0]}/{name}", target, identity


async def commit(
    agent: GuestAgent, new: str, target: str, identity: str, sha256_here: str, *, mode: int | None
) -> set[str]:
    """Give the file `new` its owner, mode and name, if it is still the one that `prepare` made and has this SHA-256.

    Gives `verified` if the guest could compute the SHA-256, and `ownerless` if there is a file already whose owner and
    mode could not be kept. Raises FileError and its kinds.
    """
    new_mode = "" if mode is None else f"{mode:o}"
    return _told(await _script(agent, _COMMIT, new, target, sha256_here, new_mode, identity), target)


async def make_space(agent: GuestAgent, name: str) -> str | None:
    """Make a folder for an archive, and give its path; None where the guest lacks the programs for archives."""
    result = await _script(agent, _MAKE_SPACE, name)
    if result is None:
        return None
    if result.exit_code != 0:
        refuse(_said(result), "/tmp")  # noqa: S108  (in the guest)
    return result.stdout.decode()


async def pack(agent: GuestAgent, folder: str, archive: str) -> tuple[str | None, str]:
    """Make an archive of what is in a folder; gives its SHA-256, None if the guest cannot, and what `tar` complains of.

    Raises FileError and its kinds.
    """
    result = await _script(agent, _PACK, folder, archive)
    if result is None:
        raise _no_programs(folder)
    said = _said(result)
    if result.exit_code not in (0, 1) or (result.exit_code == 1 and not _is_of_change(said)):
        refuse(said, folder)
    return _sha256_in(result), said if result.exit_code else ""


async def unpack(agent: GuestAgent, archive: str, folder: str, sha256_here: str) -> bool:
    """Unpack an archive, if it has this SHA-256; tells whether the guest could compute that.

    Raises FileError and its kinds.
    """
    return "verified" in _told(await _script(agent, _UNPACK, archive, folder, sha256_here), folder)


async def remove(agent: GuestAgent, path: str) -> None:
    """Remove what a copy made beside its target."""
    await completed(agent, ["rm", "-rf", "--", path])


async def forget(agent: GuestAgent, path: str, name: str) -> None:
    """Remove what `prepare` or `make_space` has perhaps made before contact was lost."""
    await _script(agent, _FORGET, path, name)


async def change_mode(agent: GuestAgent, path: str, mode: int) -> bool:
    """Give a file its mode; False where the guest cannot."""
    result = await completed(agent, ["chmod", f"{mode:o}", "--", path])
    return result is not None and result.exit_code == 0


async def _start(agent: GuestAgent, argv: Sequence[str]) -> Process:
    return Process(agent, await programs.start(agent, argv, timeout_s=CALL_TIMEOUT_S))


async def _end(process: Process) -> None:
    if process.result is None:
        try:
            await process.end()
        except CommandUnfinished as error:
            if isinstance(error.__cause__, AgentFrozen):
                raise error.__cause__ from None  # so it is asked again
            raise


async def _script(agent: GuestAgent, script: str, *words: str) -> CommandResult | None:
    return await completed(agent, ["/bin/sh", "-c", script, "sh", *words])


def _told(result: CommandResult | None, path: str) -> set[str]:
    if result is None:
        raise _no_programs(path)
    if result.exit_code == _DAMAGED:
        why = "the guest computes another SHA-256 than we do: what arrived was damaged, and is not kept"
        raise FileChanged(f"{path}: {why}", path=path, command="guest-exec")
    if result.exit_code == _EXCHANGED:
        raise exchanged(path)
    if result.exit_code != 0:
        refuse(_said(result), path)
    return set(result.stdout.decode(errors="replace").split())


def exchanged(path: str) -> FileChanged:
    """The error for a new file that somebody in the guest has put another thing in place of."""
    why = "somebody in the guest has exchanged the new file before it was whole; nothing is kept"
    return FileChanged(f"{path}: {why}", path=path, command="guest-exec")


def _no_programs(path: str) -> FileUnsuitable:
    return FileUnsuitable(
        f"{path}: the guest's agent runs no programs any more, or it has no tar, which folders take",
        path=path,
        command="guest-exec",
    )


def _sha256_in(result: CommandResult | None) -> str | None:
    found = result and _SHA256.match(result.stdout)
    return found[1].decode() if found else None


def _said(result: CommandResult) -> str:
    return result.stderr.decode(errors="replace")


def _is_of_change(said: str) -> bool:
    return all("as we read it" in line or "before we read it" in line for line in said.splitlines() if line)
