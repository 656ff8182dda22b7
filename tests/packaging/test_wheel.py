"""What a wheel carries, built from a copy so that the build cannot touch the stubs that other tests import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD_TIMEOUT_S = 100.0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "protos", tree / "protos")
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "api"))
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel"],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (path,) = (tree / "dist").glob("*.whl")
    return path


def test_it_carries_every_file_of_the_sources(wheel: Path) -> None:
    sources = ROOT / "src"
    wanted = {
        str(path.relative_to(sources))
        for path in (sources / "vmherd").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    carried = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("vmherd/")}
    assert carried == wanted


def test_it_carries_what_the_build_makes(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for stem in ("v1/controller", "v1/guest", "v1/instance", "qemu/v1/qemu", "settings/v1/settings"):
        for ending in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
            assert f"vmherd/api/{stem}{ending}" in names
    assert "vmherd/api/descriptors.binpb" in names


def test_it_carries_nothing_else(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"vmherd", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}


def test_the_command_line_runs_from_it(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    shown = subprocess.run(
        [sys.executable, "-P", "-c", "import vmherd.cli.main as m; print(m.__file__); m.main()", "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(str(tmp_path))
    assert "launch" in shown.stdout
