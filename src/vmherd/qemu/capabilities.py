"""What root may do in the helper: the capabilities that it keeps, with the reason for each. All others go at its start.

https://man7.org/linux/man-pages/man7/capabilities.7.html
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from vmherd.model.errors import FailedPrecondition

CAPABILITIES: Mapping[int, str] = MappingProxyType(
    {
        0: "CHOWN: gives disks and logs to the user of their machine, sockets to the controller's group",
        1: "DAC_OVERRIDE: opens files of the controller and of machines, without being in a group of theirs",
        3: "FOWNER: sets the mode of these files",
        5: "KILL: ends QEMU, which is another user's",
        6: "SETGID: starts QEMU in a group of its own, or in kvm's",
        7: "SETUID: starts QEMU as a user of its own",
        8: "SETPCAP: takes all of these from QEMU",
        10: "NET_BIND_SERVICE: dnsmasq, which is another user's, answers DHCP and DNS on ports 67 and 53",
        12: "NET_ADMIN: makes bridges, TAPs and firewall rules",
        13: "NET_RAW: dnsmasq looks whether an address is free before it gives it away",
    }
)

_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_VERSION_3 = 0x20080522
_LAST = Path("/proc/sys/kernel/cap_last_cap")

_Header = ctypes.c_uint32 * 2
"""Version, and the thread's id, 0 for the caller's."""
_Sets = ctypes.c_uint32 * 6
"""Effective, permitted, inheritable: the lower half of each, then the upper half of each."""


def drop() -> None:
    """Gives up every capability but these, for this process and all that it starts. It has one thread yet.

    Raises:
        FailedPrecondition: the kernel does not let it.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            raise FailedPrecondition(
                f"cannot give up root's capabilities: {name}: {os.strerror(ctypes.get_errno())}; "
                "let the helper have CAP_SETPCAP, or run it as another user",
                reason="CAPABILITIES_NOT_DROPPED",
            )

    for capability in set(range(int(_LAST.read_text()) + 1)) - CAPABILITIES.keys():
        call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
    call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header, sets = _Header(_VERSION_3, 0), _Sets()
    call("capget", header, sets)
    kept = sets[1] & sum(1 << capability for capability in CAPABILITIES)  # a container may lack some
    call("capset", header, _Sets(kept, kept))
