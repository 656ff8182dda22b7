"""The programs that networks need."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmherd.model.errors import FailedPrecondition
from vmherd.qemu.network.programs import find_program


def test_a_program_is_found_where_the_path_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert Path(find_program("nft", package="nftables")).name == "nft"


def test_a_program_that_is_missing_is_named_with_its_package() -> None:
    with pytest.raises(FailedPrecondition, match=r"no-such-nft is not installed.*install the package nftables"):
        find_program("no-such-nft", package="nftables")
