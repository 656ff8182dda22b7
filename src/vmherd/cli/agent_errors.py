"""What is wrong with a socket on which no agent answers, and what to do: there are more ways than with an instance."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

from vmherd.guest_agent import AgentError, AgentNotConfigured, AgentUnavailable, AgentUnresponsive, ProtocolError
from vmherd.guest_agent.address import Address, UnixAddress
from vmherd.model.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    Unavailable,
    VmherdError,
)

_LISTEN_S = 1.0
_QMP_GREETING = b'{"QMP"'
_MAX_SHOWN_BYTES = 60

_RIGHT_ONE = "the agent's is `path=` of the -chardev whose virtserialport is called org.qemu.guest_agent.0"

_SHARING = "`vmherd agent --listen` lets several clients share one, and `vmherd guest` asks an instance of vmherd"


def explained(error: AgentError, address: Address) -> VmherdError:
    """The error for the command line, with a hint where the cause can be told."""
    from vmherd.controller.agent_calls import to_vmherd_error  # noqa: PLC0415  (other commands need none of it)

    if isinstance(address, UnixAddress) and (found := _explained(error, Path(address.path))):
        return found
    return to_vmherd_error(error, str(address))


def _explained(error: AgentError, path: Path) -> VmherdError | None:
    if isinstance(error, AgentNotConfigured):
        return FailedPrecondition(
            f"there is no socket at {path}: the VM is off, or has it elsewhere; {_RIGHT_ONE}",
            reason="AGENT_NOT_CONFIGURED",
        )
    if isinstance(error.__cause__, PermissionError):
        return PermissionDenied(
            f"this user may not connect to {path}{_owner(path)}; run this as somebody who may",
            reason="AGENT_SOCKET_DENIED",
        )
    if found := _something_else(error, path):
        return InvalidArgument(
            f"{path} is {found}, not a guest agent's socket; {_RIGHT_ONE}", reason="AGENT_SOCKET_WRONG"
        )
    if isinstance(error.__cause__, ConnectionRefusedError):
        return Unavailable(f"nobody listens at {path} any more: the VM is off; start it", reason="AGENT_NO_VM")
    if isinstance(error, AgentUnresponsive) and not error.outcome_unknown:
        return DeadlineExceeded(f"{path}: {error}; {_SHARING}", reason="AGENT_UNRESPONSIVE")
    return None


def _something_else(error: AgentError, path: Path) -> str:
    """What is there in place of an agent's socket, empty if that cannot be told."""
    if isinstance(error.__cause__, ConnectionRefusedError):
        return "" if path.is_socket() else "no socket"
    if error.outcome_unknown or not isinstance(error, AgentUnavailable | ProtocolError):
        return ""
    heard = _heard(path)
    if heard.startswith(_QMP_GREETING):
        return "QEMU's monitor, which speaks QMP"
    if heard and not heard.startswith((b"{", b"\xff")):
        return f"a console or the like, which says {heard.strip()[:_MAX_SHOWN_BYTES].decode(errors='replace')!r}"
    return ""


def _owner(path: Path) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        return f", which belongs to {path.owner()}:{path.group()} and has mode {mode:04o}"
    except (OSError, KeyError):  # the directory is closed to us, or its owner has no name
        return ""


def _heard(path: Path) -> bytes:
    """What is said there unasked, or to a line that an agent would answer."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_LISTEN_S)
        try:
            probe.connect(str(path))
            probe.sendall(b'\n{"execute":"guest-sync","arguments":{"id":1}}\n')
            return probe.recv(1024)
        except OSError:
            return b""
