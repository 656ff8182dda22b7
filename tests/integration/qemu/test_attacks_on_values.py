"""What a controller that is not to be trusted writes into a machine's fields: refused, or one value of one option."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.qemu.attacked import Attacked, attacked
from tests.integration.qemu.house import DEADLINE_S
from vmherd.api.qemu.v1 import qemu_pb2
from vmherd.model.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from vmherd.rpc.status import from_rpc_error

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One event loop for all tests here, so that they share one helper."""
    return "asyncio"


@pytest.fixture(scope="module")
async def site() -> AsyncIterator[Attacked]:
    async with attacked() as it:
        yield it


@pytest.fixture(scope="module")
def good(site: Attacked) -> qemu_pb2.Machine:
    """A machine that has something in every field."""
    machine = site.machine()
    machine.kernel_boot.initramfs = str(site.house.kernel)
    machine.kernel_boot.command_line = "console=ttyS0"
    machine.disks.add(path=machine.disks[0].path, format=qemu_pb2.Disk.RAW, read_only=True)
    forward = qemu_pb2.PortForward(protocol=qemu_pb2.PortForward.TCP, guest_port=22)
    machine.nics[0].forwards.append(forward)
    return machine


def set_field(path: str) -> Callable[[qemu_pb2.Machine, Any], None]:
    """What sets a field that is given like `disks[0].path`."""
    *way, last = re.findall(r"\w+", path)

    def change(machine: Any, value: Any) -> None:
        for step in way:
            machine = machine[int(step)] if step.isdecimal() else getattr(machine, step)
        setattr(machine, last, value)

    return change


TEXTS = (
    "uid",
    "name",
    "kernel_boot.kernel",
    "kernel_boot.initramfs",
    "kernel_boot.command_line",
    "disks[0].path",
    "nics[0].mac",
    "nics[0].network",
    "nics[0].ipv4_address",
)
NUMBERS = {
    "generation": 32,
    "cpus": 32,
    "memory_mib": 32,
    "nics[0].forwards[0].host_port": 32,
    "nics[0].forwards[0].guest_port": 32,
    "disks[0].format": 31,
    "nics[0].backend": 31,
    "nics[0].forwards[0].protocol": 31,
}

HOSTILE = (
    "web,readonly=on",
    "web,,readonly=on",
    ",",
    "=",
    "id=qmp",
    "a\nb",
    "a\r\nb",
    "a\0b",
    "a\x1b[2Jb",
    "a\u2028b",
    "a\u202eb",
    " ",
    "a b",
    "-",
    "--",
    "-snapshot",
    "-daemonize",
    "-qmp unix:/tmp/x,server=on",
    "..",
    "../..",
    "/",
    "$(reboot)",
    "`reboot`",
    "%s%n",
    "'; reboot; '",
    '{"driver":"file"}',
    "json:{}",
    "file:/etc/passwd",
    "/dev/fdset/3",
    "/proc/self/fd/3",
    "x" * 100_000,
    "ä",
    "\N{FIRE}",
)


@pytest.mark.parametrize("field", TEXTS)
async def test_a_hostile_value_is_refused(site: Attacked, good: qemu_pb2.Machine, field: str) -> None:
    """Only the kernel's command line may hold what has a meaning to others: QEMU takes it as one word as it is."""
    change = set_field(field)
    for value in HOSTILE:
        machine = copy.deepcopy(good)
        change(machine, value)
        if field == "kernel_boot.command_line" and value.isprintable() and len(value) < 2048:
            assert (await plan(site, machine))[-1] is not None
            continue
        error = await site.refuses(machine)
        assert isinstance(error, InvalidArgument | PermissionDenied | FailedPrecondition), value
        assert field in str(error), value


def shape(argv: list[str], machine: qemu_pb2.Machine) -> list[dict[str, str]]:
    """The words as QEMU reads them, but for the values that are a machine's alone: each is in its one place."""
    words = {"-uuid": machine.uid, "-append": machine.kernel_boot.command_line}
    values = {"guest": machine.name, "mac": machine.nics[0].mac}
    shown = []
    for before, word in itertools.pairwise(argv):
        if before in words:
            assert word == words[before]
            continue
        # QEMU's own rule: a comma parts, and two of them are one.
        pairs = (part.replace("\0", ",").partition("=") for part in word.replace(",,", "\0").split(","))
        options = {key: value for key, _, value in pairs}
        for key in options.keys() & values.keys():
            assert options.pop(key) == values[key]
        shown.append(options)
    return shown


async def plan(site: Attacked, machine: qemu_pb2.Machine) -> list[str]:
    return list((await site.house.stub.Plan(qemu_pb2.PlanRequest(machine=machine), timeout=DEADLINE_S)).argv)


texts = st.sampled_from(HOSTILE) | st.text(max_size=50)
printable = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=50)
changes = st.one_of(
    st.tuples(st.sampled_from(TEXTS), texts),
    st.tuples(st.just("kernel_boot.command_line"), printable),
    st.tuples(st.just("name"), st.from_regex(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)),
    st.tuples(st.just("nics[0].mac"), st.from_regex(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", fullmatch=True)),
    st.sampled_from(sorted(NUMBERS)).flatmap(
        lambda field: st.tuples(st.just(field), st.integers(0, 2 ** NUMBERS[field] - 1) | st.integers(0, 300))
    ),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed=st.lists(changes, min_size=1, max_size=3))
async def test_whatever_is_taken_has_the_shape_of_every_other_command_line(
    site: Attacked, good: qemu_pb2.Machine, changed: list[tuple[str, Any]]
) -> None:
    machine = copy.deepcopy(good)
    for field, value in changed:
        set_field(field)(machine, value)
    site.news()
    try:
        argv = await plan(site, machine)
    except grpc.aio.AioRpcError as caught:
        error = from_rpc_error(caught)
        [line] = site.news()
        assert (line["event"], line["call"], line["reason"]) == ("refused", "Plan", error.reason)
        assert line["why"][:200] == error.message[:200]
        return
    assert site.news() == []
    alike = copy.deepcopy(good)
    for name in ("cpus", "memory_mib"):
        setattr(alike, name, getattr(machine, name))  # other words follow from them
    for disk, other in zip(alike.disks, machine.disks, strict=True):
        disk.format = other.format
    alike.nics[0].forwards[0].CopyFrom(machine.nics[0].forwards[0])
    if not machine.kernel_boot.command_line:
        alike.kernel_boot.command_line = ""
    if not machine.kernel_boot.initramfs:
        alike.kernel_boot.initramfs = ""
    assert shape(argv, machine) == shape(await plan(site, alike), alike)
