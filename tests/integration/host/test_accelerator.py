"""The probe and QEMU, for real. Nothing here depends on a KVM that works or is there."""

# ruff: noqa: ASYNC240 - the files are small and the loop has nothing else to do

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmherd.host import accelerator
from vmherd.host.accelerator import PROBE, Accelerators, Measurement, measure

pytestmark = pytest.mark.anyio

SOURCE = PROBE.with_suffix(".S")
AMPLE_S = 60.0  # for a busy machine; nothing waits that long by design


@pytest.fixture
def qemu() -> Path:
    found = shutil.which("qemu-system-x86_64")
    assert found, "qemu-system-x86_64 is missing: install the package qemu-system-x86"
    return Path(found)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "accelerators.json"


def children() -> set[int]:
    """Every child of this process, the dead that nobody has waited for among them."""
    threads = Path("/proc/self/task").iterdir()
    return {int(pid) for thread in threads for pid in (thread / "children").read_text().split()}


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = children()
    yield
    assert children() == before
    assert list(scratch.iterdir()) == []


@pytest.fixture
def assemble(tmp_path: Path) -> Callable[[str], Path]:
    """Turns assembly text into a probe, with the commands that the head of the source names."""

    def run(*words: str | Path) -> None:
        assert shutil.which(words[0]), f"{words[0]} is missing: install the package binutils"
        subprocess.run(words, check=True, timeout=AMPLE_S)

    def make(source: str) -> Path:
        text, built, linked, probe = (tmp_path / f"probe{suffix}" for suffix in (".S", ".o", ".elf", ".bin"))
        text.write_text(source)
        run("as", "--64", "-o", built, text)
        run("ld", "-m", "elf_x86_64", "-Ttext=0x100000", "-e", "0x100000", "-o", linked, built)
        run("objcopy", "-O", "binary", "-j", ".text", linked, probe)
        return probe

    return make


@pytest.fixture
def variant(assemble: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a probe with one line of its source changed in the place of the real one."""

    def use(line: str, replacement: str) -> None:
        source = SOURCE.read_text()
        assert source.count(line) == 1
        monkeypatch.setattr(accelerator, "PROBE", assemble(source.replace(line, replacement)))

    return use


def test_the_probe_is_its_source_assembled(assemble: Callable[[str], Path]) -> None:
    assert assemble(SOURCE.read_text()).read_bytes() == PROBE.read_bytes()


async def test_tcg_finishes(qemu: Path) -> None:
    measured = await measure(qemu, "tcg", deadline_s=AMPLE_S)
    assert measured.usable, measured.detail
    assert measured.elapsed_s is not None
    assert 0 < measured.elapsed_s < AMPLE_S


async def test_time_runs_out_before_qemu_has_started(qemu: Path) -> None:
    assert await measure(qemu, "tcg", deadline_s=0.01) == Measurement("tcg", None, "not finished after 0.01 s")


async def test_time_runs_out_on_a_guest_that_hangs(qemu: Path, variant: Callable[[str, str], None]) -> None:
    variant("out %al, $EXIT_PORT", "jmp 3b")
    assert await measure(qemu, "tcg", deadline_s=0.5) == Measurement("tcg", None, "not finished after 0.50 s")


async def test_a_cancelled_measurement_ends_qemu(qemu: Path, variant: Callable[[str, str], None]) -> None:
    variant("out %al, $EXIT_PORT", "jmp 3b")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(measure(qemu, "tcg", deadline_s=AMPLE_S), timeout=0.5)


@pytest.mark.parametrize(
    ("line", "replacement", "status"),
    [
        pytest.param("lidt idt_pointer", "nop", 0, id="triple fault"),
        pytest.param("inc %r9d", "nop", 3, id="wrong number of faults"),
        pytest.param("incq (%rbx)", "incb 1(%rbx)", 3, id="wrong sum"),
    ],
)
async def test_a_guest_that_fails_is_no_success(
    qemu: Path, variant: Callable[[str, str], None], line: str, replacement: str, status: int
) -> None:
    variant(line, replacement)
    measured = await measure(qemu, "tcg", deadline_s=AMPLE_S)
    assert measured == Measurement("tcg", None, f"QEMU exited with status {status}")


async def test_what_qemu_complains_of_is_reported(qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "CPU_MODEL", "abacus")
    measured = await measure(qemu, "tcg", deadline_s=AMPLE_S)
    assert not measured.usable
    assert "exited with status 1" in measured.detail
    assert "abacus" in measured.detail


async def test_a_qemu_that_is_not_there_is_named(tmp_path: Path, cache: Path) -> None:
    missing = tmp_path / "qemu-system-none"
    with pytest.raises(FileNotFoundError, match=str(missing)):
        await measure(missing, "tcg", deadline_s=AMPLE_S)
    with pytest.raises(FileNotFoundError, match=str(missing)):
        await Accelerators(missing, cache).choose("auto")
    assert not cache.exists()


async def test_auto_measures_once(qemu: Path, cache: Path) -> None:
    accelerators = Accelerators(qemu, cache, deadline_s=AMPLE_S)
    measured = await accelerators.measurements()
    assert measured.tcg.usable
    assert await accelerators.choose("auto") == measured.faster

    # Times that no host has show that the next process reads the file and measures nothing.
    remembered = json.loads(cache.read_text())
    remembered["measurements"]["kvm"] = {"elapsed_s": 1000.0, "detail": ""}
    remembered["measurements"]["tcg"] = {"elapsed_s": 2000.0, "detail": ""}
    cache.write_text(json.dumps(remembered))
    next_process = Accelerators(qemu, cache, deadline_s=AMPLE_S)
    assert (await next_process.measurements()).tcg == Measurement("tcg", 2000.0)
    assert await next_process.choose("auto") == "kvm"
