"""The built-in guest, for every test that boots one."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmherd.image.builtin import build_builtin
from vmherd.image.registry import KernelImage


@pytest.fixture(scope="session")
def builtin_image(tmp_path_factory: pytest.TempPathFactory) -> KernelImage:
    """The built-in guest. It is built once for a user of this host and then taken from the cache."""
    images_dir: Path = tmp_path_factory.mktemp("images")
    return build_builtin(images_dir)
