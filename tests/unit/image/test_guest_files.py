from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from vmherd.image.builtin.initramfs import GUEST

SCRIPTS = sorted(path for path in GUEST.rglob("*") if path.is_file() and path.read_bytes().startswith(b"#!"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(GUEST)))
def test_a_script_is_well_formed(script: Path) -> None:
    checked = subprocess.run(["sh", "-n", script], capture_output=True, text=True, timeout=60, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_every_module_that_a_script_loads_is_in_the_guest() -> None:
    modules = (GUEST / "etc/modules").read_text().split()
    loaded = [
        name
        for script in SCRIPTS
        for names in re.findall(r"modprobe -a ([\w ]+)", script.read_text())
        for name in names.split()
    ]
    assert loaded
    assert set(loaded) <= set(modules)


def test_init_starts_only_what_is_there() -> None:
    lines = [line for line in (GUEST / "etc/inittab").read_text().splitlines() if not line.startswith("#")]
    programs = [line.split(":", maxsplit=3)[3].split()[0] for line in lines]
    own = [program for program in programs if program.startswith("/etc/")]
    assert own
    for program in own:
        assert (GUEST / program.removeprefix("/")) in SCRIPTS
