"""Build hook: turns protos/ into the vmherd.api package, for wheels, `pip install .` and `pip install -e .` alike."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
PROTOS = ROOT / "protos"
API = ROOT / "src" / "vmherd" / "api"


class StubsHook(BuildHookInterface):
    """Generates message classes, type stubs, gRPC stubs and one descriptor set that keeps the comments."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Runs before every build, the editable one included."""
        if PROTOS.is_dir():  # an sdist or a wheel built from one carries them as well
            generate()


def generate() -> None:
    """Writes src/vmherd/api anew; an old file whose .proto is gone goes with it."""
    shutil.rmtree(API, ignore_errors=True)
    API.mkdir(parents=True)
    well_known = Path(importlib.import_module("grpc_tools").__file__).parent / "_proto"
    google_api = Path(importlib.import_module("google.api.annotations_pb2").__file__).parents[2]
    sources = sorted(str(path) for path in PROTOS.rglob("*.proto"))
    out = ROOT / "src"
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            *(f"-I{PROTOS}", f"-I{google_api}", f"-I{well_known}"),
            *(f"--python_out={out}", f"--grpc_python_out={out}"),
            *(f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}"),
            f"--descriptor_set_out={API / 'descriptors.binpb'}",
            *("--include_imports", "--include_source_info"),
            *sources,
        ],
        check=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},  # protoc-gen-mypy
    )
    for folder in (API, *(path for path in API.rglob("*") if path.is_dir())):
        (folder / "__init__.py").write_text('"""Generated from protos/ by hatch_build.py; never edited."""\n')


if __name__ == "__main__":
    generate()
