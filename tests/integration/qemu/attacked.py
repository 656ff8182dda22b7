"""A helper that is attacked, in a network namespace of its own where that can be had, and what can be seen of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from tests.integration.qemu import house as houses
from tests.integration.qemu.house import DEADLINE_S, House
from vmherd.api.qemu.v1 import qemu_pb2
from vmherd.api.settings.v1.settings_pb2 import UidRange
from vmherd.model.errors import VmherdError
from vmherd.rpc.channel import open_channel
from vmherd.rpc.status import from_rpc_error

ROOT = os.geteuid() == 0
CONTROLLER = 64998
STRANGER = 64997
UIDS = UidRange(first=1899970000, count=1000)
SECRET = b"what no guest may read"

IN_PLACE_OF_QEMU = """#!/bin/sh
case "$1" in --version) echo 'QEMU emulator version 99.1 (Test)'; exit;; -machine) exit;; esac
kill -STOP $$
"""
"""It keeps the command line and the descriptors that it was given, and needs no time."""


class Attacked:
    """A house whose helper keeps a log, and a secret beside its directories."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.outside = house.path / "state" / "outside"
        """A directory on the same file system, for hard links, in which no machine may have anything."""
        self.outside.mkdir(mode=0o700)
        self.secret = self.outside / "secret"
        self.secret.write_bytes(SECRET)
        self.secret.chmod(0o600)
        self._log = house.path / "state" / "helper.log"
        self._log_read = 0

    async def open(self) -> None:
        """Starts the helper as an administrator would, with another user for the controller if we are root."""
        settings = self.house.path / "state" / "qemu.json"
        qemu = self.house.path / "state" / "qemu"
        qemu.write_text(IN_PLACE_OF_QEMU)
        qemu.chmod(0o755)
        self.house.settings.qemu_binary = str(qemu)
        if ROOT:
            self.house.settings.controller_user = str(CONTROLLER)
            self.house.settings.uids.CopyFrom(UIDS)
        settings.write_text(json_format.MessageToJson(self.house.settings))
        words = (*(("unshare", "--net") if ROOT else ()), sys.executable, "-P", "-m", "vmherd", "qemu")
        with self._log.open("ab") as log:
            self.house.helper = await asyncio.create_subprocess_exec(*words, "--settings", str(settings), stderr=log)
        self.house.channel = open_channel(self.house.listen)
        await self.house.stub.List(qemu_pb2.ListRequest(), wait_for_ready=True, timeout=DEADLINE_S)
        # From here on it knows its QEMU, and starts no process that it is not asked for.
        await self.house.stub.Host(qemu_pb2.HostRequest(), timeout=DEADLINE_S)
        self.news()

    def news(self) -> list[dict[str, Any]]:
        """The log's lines since the last time."""
        with self._log.open("rb") as log:
            log.seek(self._log_read)
            whole, newline, _ = log.read().rpartition(b"\n")  # the last line may still be on its way
        self._log_read += len(whole + newline)
        return [json.loads(line) for line in whole.splitlines()]

    def files(self) -> dict[str, object]:
        """Everything below the house, but for the log."""
        return {
            str(path): _seen(path)
            for root, directories, names in os.walk(self.house.path)
            for path in (Path(root, name) for name in (*directories, *names))
            if path != self._log
        }

    def descriptors(self) -> int:
        """How many descriptors the helper has."""
        return len(os.listdir(f"/proc/{self.helper_pid}/fd"))

    def resident_kib(self) -> int:
        """The helper's resident memory."""
        status = Path(f"/proc/{self.helper_pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    @property
    def helper_pid(self) -> int:
        assert self.house.helper is not None
        return self.house.helper.pid

    async def fingerprint(self) -> dict[str, object]:
        """Files, processes and the network: equal before and after what must change nothing."""
        return {
            "files": self.files(),
            "children": self._children(),
            "processes": [str(process) for process in await self.house.processes()],
            "network": await self._network() if ROOT else None,
        }

    def _children(self) -> str:
        return Path(f"/proc/{self.helper_pid}/task/{self.helper_pid}/children").read_text()

    async def _network(self) -> bytes:
        said = b""
        for words in (("ip", "addr"), ("ip", "route"), ("nft", "list", "ruleset")):
            command = ("nsenter", f"--net=/proc/{self.helper_pid}/ns/net", "--", *words)
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            said += (await process.communicate())[0]
        return said

    @asynccontextmanager
    async def unchanged(self) -> AsyncIterator[None]:
        """What is done in the body changes nothing."""
        before = await self.fingerprint()
        yield
        assert await self.fingerprint() == before

    async def refuses(self, machine: qemu_pb2.Machine) -> VmherdError:
        """Asks for a start, which is refused, logged with its reason, and changes nothing."""
        self.news()
        async with self.unchanged():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await self.house.start(machine)
        error = from_rpc_error(caught.value)
        [line] = self.news()
        assert (line["event"], line["level"], line["call"]) == ("refused", "warning", "Start")
        assert (line["reason"], line["why"][:200]) == (error.reason, error.message[:200])
        assert line["uid"] == machine.uid[:500]
        return error

    def give(self, *paths: Path) -> None:
        """Makes files the controller's, who makes them in truth."""
        for path in paths:
            if ROOT:
                os.chown(path, CONTROLLER, CONTROLLER, follow_symlinks=False)

    def machine(self, **changes: object) -> qemu_pb2.Machine:
        """A good machine of a new instance. Its directory and disk are the controller's."""
        machine = self.house.machine(**changes)
        state = self.house.state.instance(machine.uid)
        self.give(state.path, state.disk)
        return machine

    def forget(self, machine: qemu_pb2.Machine) -> None:
        """Removes what there is of an instance."""
        shutil.rmtree(self.house.state.instance(machine.uid).path)

    async def end(self, process: qemu_pb2.Process) -> None:
        """Ends a machine that was started, and lets go of it."""
        await self.house.stub.Stop(
            qemu_pb2.StopRequest(uid=process.uid, generation=process.generation), timeout=DEADLINE_S
        )
        await self.house.release(process.uid)


def _seen(path: Path) -> object:
    status = path.lstat()
    kind = status.st_mode
    contents = ""
    if stat.S_ISREG(kind):
        contents = hashlib.sha256(path.read_bytes()).hexdigest()
    elif stat.S_ISLNK(kind):
        contents = os.readlink(path)
    return (kind, status.st_uid, status.st_gid, status.st_nlink, status.st_ino, contents)


@asynccontextmanager
async def attacked() -> AsyncIterator[Attacked]:
    """A house under attack. Afterwards nothing of it is left, or the test has failed."""
    async with houses.house() as house:
        await house.close(signal.SIGTERM)
        shutil.rmtree(house.run.path)
        it = Attacked(house)
        await it.open()
        yield it
