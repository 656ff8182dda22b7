from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vmherd.model.errors import ResourceExhausted
from vmherd.qemu import uids
from vmherd.qemu.uids import Uids, lowest_free


def test_the_range_has_room_for_the_probe_and_dnsmasq_before_the_machines() -> None:
    it = Uids(first=1000, count=10)
    assert (it.probe, it.dnsmasq, it.machines) == (1000, 1001, range(1002, 1010))


@pytest.mark.parametrize(("taken", "free"), [((), 10), ((10,), 11), ((11, 12), 10), ((10, 12), 11), ((9, 99), 10)])
def test_a_machine_gets_the_lowest_uid_that_nobody_has(taken: tuple[int, ...], free: int) -> None:
    assert lowest_free(range(10, 13), taken) == free


def test_there_may_be_none_left() -> None:
    with pytest.raises(ResourceExhausted, match="all 2 users for machines are taken") as caught:
        lowest_free(range(10, 12), (10, 11))
    assert caught.value.reason == "UIDS_EXHAUSTED"


def test_owners_are_those_of_the_directories_themselves(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "directory").mkdir()
    if os.geteuid() == 0:
        os.chown(tmp_path / "directory", 1900000007, -1)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        assert set(uids.owners(descriptor)) == {os.geteuid(), (tmp_path / "directory").stat().st_uid}
    finally:
        os.close(descriptor)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has processes of other users")
def test_a_user_has_a_process_until_it_ends() -> None:
    users = range(1899999990, 1899999999)
    with subprocess.Popen(["sleep", "60"], user=users[3]) as process:
        assert set(uids.running(users)) == {users[3]}
        assert set(uids.running(users[4:])) == set()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert set(uids.running(users)) == set()  # its parent has not waited for it yet
