"""What stays on the host when a helper ends, and how it is removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vmherd.model.errors import FailedPrecondition
from vmherd.model.network import Network
from vmherd.qemu.network import dnsmasq, links, rules
from vmherd.qemu.network.dnsmasq import DnsmasqFiles
from vmherd.qemu.network.forwarding import set_forwarding
from vmherd.qemu.network.links import Link, bridge_mac
from vmherd.qemu.network.programs import nft


async def teardown(networks: Sequence[Network], directory: Path) -> None:
    """Removes everything that helpers with this directory have made of networks; once more does nothing more.

    Raises:
        FailedPrecondition: machines are plugged in, or a helper is at work.
    """
    with contextlib.suppress(FileNotFoundError), held(directory), told():
        async with AsyncIPRoute() as ipr:
            await remove(ipr, directory, known(directory) | {network.bridge for network in networks if network.subnet})
        set_forwarding(directory, wanted=())
        os.rmdir(directory)


async def remove(ipr: AsyncIPRoute, directory: Path, bridges: Iterable[str]) -> None:
    """Removes the networks of these bridges, all or none; where a bridge is not a helper's own, what is on it.

    Raises:
        FailedPrecondition: machines are plugged in.
    """
    own: dict[str, Link | None] = dict.fromkeys(bridges)
    for name in own:
        bridge = await links.find_link(ipr, name)
        if bridge is None or bridge.mac != bridge_mac(directory, name):
            continue
        own[name] = bridge
        if ports := await links.ports_of(ipr, bridge):
            listed = ", ".join(port.name for port in ports)
            raise FailedPrecondition(
                f"bridge {name} is in use by {listed}; stop the machines that are plugged into it first",
                reason="NETWORK_IN_USE",
                metadata={"bridge": name},
            )
    for name, bridge in own.items():
        files = DnsmasqFiles(directory / name)
        await dnsmasq.end(files)
        await nft(rules.removal(name))
        if bridge:
            await ipr.link("del", index=bridge.index)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(files.path)


def known(directory: Path) -> set[str]:
    """The bridges of the networks that a helper has made, or began to."""
    return {path.name for path in directory.iterdir() if path.is_dir()}


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keeps other helpers, and a teardown, out of a directory.

    Raises:
        FailedPrecondition: one is in there.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise FailedPrecondition(
            f"another helper keeps the networks of {directory}; end that one first (`pgrep -af 'vmherd qemu'`)",
            reason="NETWORK_IN_USE",
        ) from error
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Tells what the kernel refuses as an error of this project.

    Raises:
        FailedPrecondition: it refused something.
    """
    try:
        yield
    except (NetlinkError, OSError) as error:
        raise FailedPrecondition(
            f"the kernel refuses a change of the host's networks: {error}", reason="NETWORK_NOT_USABLE"
        ) from error
