"""The choice between KVM and TCG, what is remembered of it, and how QEMU's end is judged."""

# ruff: noqa: ASYNC240 - the files are small and the loop has nothing else to do

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from vmherd.host import accelerator
from vmherd.host.accelerator import Accelerator, Accelerators, Measurement, Measurements, measure

pytestmark = pytest.mark.anyio

FAST, SLOW, BROKEN = 0.125, 0.25, None


class Host:
    """Accelerators with known times, in the place of `measure`; it notes each call's accelerator and deadline."""

    def __init__(self, *, kvm: float | None, tcg: float | None) -> None:
        self.elapsed_s: dict[Accelerator, float | None] = {"kvm": kvm, "tcg": tcg}
        self.calls: list[tuple[str, float]] = []
        self.befores: list[Sequence[str]] = []

    async def measure(
        self, qemu_binary: Path, accelerator: Accelerator, *, before: Sequence[str], deadline_s: float
    ) -> Measurement:
        self.calls.append((accelerator, deadline_s))
        self.befores.append(before)
        await asyncio.sleep(0)  # lets a second caller in, as a real measurement does
        elapsed_s = self.elapsed_s[accelerator]
        return Measurement(accelerator, elapsed_s, "" if elapsed_s else "broken")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(kvm=FAST, tcg=SLOW)
    monkeypatch.setattr(accelerator, "measure", made.measure)
    return made


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    path = tmp_path / "qemu"
    path.touch()
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state" / "accelerators.json"


@pytest.mark.parametrize(
    ("kvm", "tcg", "faster"),
    [
        (FAST, SLOW, "kvm"),
        (FAST, FAST, "kvm"),
        (SLOW, FAST, "tcg"),
        (BROKEN, SLOW, "tcg"),
        (SLOW, BROKEN, "kvm"),
        (BROKEN, BROKEN, "tcg"),
    ],
)
async def test_auto_is_the_faster_one(
    host: Host, qemu: Path, cache: Path, kvm: float | None, tcg: float | None, faster: str
) -> None:
    host.elapsed_s = {"kvm": kvm, "tcg": tcg}
    assert await Accelerators(qemu, cache).choose("auto") == faster


@pytest.mark.parametrize("forced", ["kvm", "tcg"])
async def test_a_forced_accelerator_is_not_measured(host: Host, cache: Path, forced: Accelerator) -> None:
    assert await Accelerators(Path("/nonexistent"), cache).choose(forced) == forced
    assert host.calls == []


async def test_each_is_measured_as_the_user_that_gets_it(host: Host, qemu: Path, cache: Path) -> None:
    await Accelerators(qemu, cache, before=lambda accelerator: ("as", accelerator)).measurements()
    assert host.befores == [("as", "tcg"), ("as", "kvm")]


async def test_kvm_gets_as_long_as_it_could_still_win(host: Host, qemu: Path, cache: Path) -> None:
    await Accelerators(qemu, cache, deadline_s=5.0).measurements()
    assert host.calls == [("tcg", 5.0), ("kvm", 3 * SLOW)]


@pytest.mark.parametrize("tcg", [BROKEN, 4.0])
async def test_kvm_gets_no_more_than_the_deadline(host: Host, qemu: Path, cache: Path, tcg: float | None) -> None:
    host.elapsed_s["tcg"] = tcg
    await Accelerators(qemu, cache, deadline_s=5.0).measurements()
    assert host.calls[1] == ("kvm", 5.0)


async def test_callers_at_the_same_time_share_one_measurement(host: Host, qemu: Path, cache: Path) -> None:
    accelerators = Accelerators(qemu, cache)
    first, second = await asyncio.gather(accelerators.measurements(), accelerators.measurements())
    assert first is second
    assert len(host.calls) == 2


async def test_measurements_outlive_the_process(host: Host, qemu: Path, cache: Path) -> None:
    host.elapsed_s["kvm"] = BROKEN
    measured = await Accelerators(qemu, cache).measurements()
    assert measured == Measurements(Measurement("kvm", None, "broken"), Measurement("tcg", SLOW))
    host.calls.clear()
    assert await Accelerators(qemu, cache).measurements() == measured
    assert host.calls == []
    assert os.listdir(cache.parent) == [cache.name]


async def test_a_changed_qemu_is_measured_anew(host: Host, qemu: Path, cache: Path) -> None:
    accelerators = Accelerators(qemu, cache)
    await accelerators.measurements()
    qemu.write_text("another version")
    host.elapsed_s["kvm"] = BROKEN
    assert await accelerators.choose("auto") == "tcg"
    assert await Accelerators(qemu, cache).choose("auto") == "tcg"
    assert len(host.calls) == 4


@pytest.mark.parametrize("name", ["kernel", "cpu", "machine_id", "kvm", "qemu", "probe_sha256"])
async def test_a_file_of_another_host_or_qemu_is_replaced(host: Host, qemu: Path, cache: Path, name: str) -> None:
    await Accelerators(qemu, cache).measurements()
    ours = cache.read_text()
    foreign = json.loads(ours)
    foreign["identity"][name] = "another"
    cache.write_text(json.dumps(foreign))
    await Accelerators(qemu, cache).measurements()
    assert len(host.calls) == 4
    assert cache.read_text() == ours


async def test_kvm_that_appears_is_measured(
    host: Host, qemu: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "kvm"
    monkeypatch.setattr(accelerator, "KVM_DEVICE", device)
    accelerators = Accelerators(qemu, cache)
    await accelerators.measurements()
    device.touch()
    await accelerators.measurements()
    assert len(host.calls) == 4


async def test_a_broken_qemu_is_not_remembered(host: Host, qemu: Path, cache: Path) -> None:
    host.elapsed_s = {"kvm": BROKEN, "tcg": BROKEN}
    accelerators = Accelerators(qemu, cache)
    assert await accelerators.choose("auto") == "tcg"
    assert not cache.exists()
    host.elapsed_s = {"kvm": FAST, "tcg": SLOW}
    assert await accelerators.choose("auto") == "kvm"


def set_in(*keys: str, value: object) -> Callable[[str], str]:
    def change(text: str) -> str:
        document = inner = json.loads(text)
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return json.dumps(document)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda text: "", id="empty"),
        pytest.param(lambda text: text[:-10], id="torn"),
        pytest.param(lambda text: " " * 65_536 + text, id="too long"),
        pytest.param(lambda text: "\udcff", id="not UTF-8"),
        pytest.param(lambda text: "[" * 60_000, id="deep"),
        pytest.param(lambda text: "[]", id="a list"),
        pytest.param(lambda text: "{}", id="no identity"),
        pytest.param(set_in("measurements", value=None), id="no measurements"),
        pytest.param(set_in("measurements", "tcg", value={}), id="no values"),
        pytest.param(set_in("measurements", "kvm", "elapsed_s", value="0.1"), id="time is text"),
        pytest.param(set_in("measurements", "kvm", "elapsed_s", value=True), id="time is true"),
        pytest.param(set_in("measurements", "kvm", "elapsed_s", value=-0.1), id="negative time"),
        pytest.param(set_in("measurements", "kvm", "elapsed_s", value=float("nan")), id="time is NaN"),
        pytest.param(set_in("measurements", "kvm", "detail", value=1), id="detail is a number"),
    ],
)
async def test_a_damaged_file_is_replaced(
    host: Host, qemu: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[str], str]
) -> None:
    measured = await Accelerators(qemu, cache).measurements()
    good = cache.read_text()
    cache.write_text(damage(good), errors="surrogateescape")
    assert await Accelerators(qemu, cache).measurements() == measured
    assert len(host.calls) == 4
    assert cache.read_text() == good
    assert f"{cache} is ignored" in caplog.text


def link(cache: Path) -> None:
    cache.symlink_to(cache.rename(cache.parent.parent / "elsewhere"))


def fifo(cache: Path) -> None:
    cache.unlink()
    os.mkfifo(cache)


@pytest.mark.parametrize("swap", [link, fifo])
async def test_only_a_plain_file_is_read_and_nothing_else_written(
    host: Host, qemu: Path, cache: Path, swap: Callable[[Path], None]
) -> None:
    await Accelerators(qemu, cache).measurements()
    swap(cache)
    host.elapsed_s["kvm"] = BROKEN
    assert await Accelerators(qemu, cache).choose("auto") == "tcg"
    assert not cache.is_symlink()
    assert json.loads(cache.read_text())["measurements"]["kvm"]["elapsed_s"] is None
    elsewhere = cache.parent.parent / "elsewhere"
    assert not elsewhere.exists() or json.loads(elsewhere.read_text())["measurements"]["kvm"]["elapsed_s"]


async def test_a_file_of_another_user_is_not_believed(
    host: Host, qemu: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await Accelerators(qemu, cache).measurements()
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    await Accelerators(qemu, cache).measurements()
    assert len(host.calls) == 4
    assert "not a file of this user" in caplog.text


def taken_by_a_directory(cache: Path) -> None:
    cache.mkdir()


def without_its_directory(cache: Path) -> None:
    cache.parent.rmdir()


@pytest.mark.parametrize("obstruct", [taken_by_a_directory, without_its_directory])
async def test_a_file_that_cannot_be_written_costs_only_memory(
    host: Host,
    qemu: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    obstruct: Callable[[Path], None],
) -> None:
    obstruct(cache)
    accelerators = Accelerators(qemu, cache)
    assert await accelerators.measurements() is await accelerators.measurements()
    assert "is forgotten when this process ends" in caplog.text
    assert not cache.parent.exists() or os.listdir(cache.parent) == [cache.name]


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    """Makes an executable of a shell script, for ends that QEMU cannot be made to come to at will."""

    def make(script: str) -> Path:
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return make


async def test_the_status_of_a_finished_probe_is_a_success(program: Callable[[str], Path]) -> None:
    started_s = time.monotonic()
    measured = await measure(program("exit 85"), "tcg", deadline_s=10.0)
    assert measured.usable
    assert measured.elapsed_s is not None
    assert 0 < measured.elapsed_s <= time.monotonic() - started_s
    assert measured.detail == ""


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        ("exit 0", "QEMU exited with status 0"),
        ("exit 3", "QEMU exited with status 3"),
        ("echo one >&2; echo two >&2; exit 1", "QEMU exited with status 1: one: two"),
        ("printf '\\377' >&2; exit 1", "QEMU exited with status 1: \ufffd"),
        ("kill -ABRT $$", "QEMU died of signal 6 (Aborted)"),
        ("kill -KILL $$", "QEMU died of signal 9 (Killed)"),
    ],
)
async def test_every_other_end_is_a_failure(program: Callable[[str], Path], script: str, detail: str) -> None:
    assert await measure(program(script), "tcg", deadline_s=10.0) == Measurement("tcg", None, detail)


async def test_only_the_end_of_a_long_complaint_is_kept(program: Callable[[str], Path]) -> None:
    measured = await measure(
        program("head -c 100000 /dev/zero | tr '\\0' x >&2; echo why >&2; exit 1"), "tcg", deadline_s=10.0
    )
    assert measured.detail.endswith("xwhy")
    assert len(measured.detail) < 600


async def test_without_a_kvm_device_nothing_is_started(
    program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, started = tmp_path / "kvm", tmp_path / "started"
    monkeypatch.setattr(accelerator, "KVM_DEVICE", device)
    measured = await measure(program(f"touch {started}; exit 85"), "kvm", deadline_s=10.0)
    assert measured == Measurement("kvm", None, f"{device}: No such file or directory")
    assert not started.exists()


async def test_a_kvm_device_that_opens_is_tried(
    program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accelerator, "KVM_DEVICE", device)
    assert (await measure(program("exit 85"), "kvm", deadline_s=10.0)).usable


async def test_both_get_the_same_command_line_but_for_the_accelerator(
    program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, words = tmp_path / "kvm", tmp_path / "words"
    device.touch()
    monkeypatch.setattr(accelerator, "KVM_DEVICE", device)
    seen: dict[str, list[str]] = {}
    both: tuple[Accelerator, Accelerator] = ("kvm", "tcg")
    for name in both:
        await measure(program(f"printf '%s\\n' \"$@\" >{words}; exit 85"), name, deadline_s=10.0)
        seen[name] = words.read_text().splitlines()
    assert [(kvm, tcg) for kvm, tcg in zip(seen["kvm"], seen["tcg"], strict=True) if kvm != tcg] == [both]
    assert "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny" in seen["tcg"]
