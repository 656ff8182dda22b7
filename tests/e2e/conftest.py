"""Herds for the end-to-end tests: real processes, real QEMU, the real built-in guest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.framework.herd import HerdUnderTest, herd_under_test
from tests.framework.images import builtin_image
from vmherd.image.registry import KernelImage

__all__ = ["builtin_image"]


@pytest.fixture
def herd(builtin_image: KernelImage) -> Iterator[HerdUnderTest]:
    """A herd for this test alone, to be treated badly."""
    with herd_under_test(builtin_image) as started:
        yield started


@pytest.fixture
def unchanged(shared_herd: HerdUnderTest) -> Iterator[None]:
    """The test leaves the store and the disk of the shared herd as they are."""
    before = shared_herd.store_revision(), shared_herd.fingerprint()
    yield
    assert (shared_herd.store_revision(), shared_herd.fingerprint()) == before


@pytest.fixture(scope="module")
def shared_herd(builtin_image: KernelImage) -> Iterator[HerdUnderTest]:
    """A herd for all tests of a module, which leave it as they found it."""
    with herd_under_test(builtin_image) as started:
        yield started
