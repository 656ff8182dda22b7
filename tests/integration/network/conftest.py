"""What the tests of networks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.network import world as worlds


@pytest.fixture
def world() -> Iterator[worlds.World]:
    with worlds.world() as it:
        yield it
