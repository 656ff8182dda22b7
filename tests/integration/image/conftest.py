"""The built-in guest itself, for the tests of it."""

from __future__ import annotations

from tests.framework.images import builtin_image

__all__ = ["builtin_image"]
