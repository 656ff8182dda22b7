"""What can go wrong with an image.

::

    ImageError
     ├── ImageNotFound    name another image, or make this one
     ├── ImageCorrupt     its files are not what its description says; make it anew
     └── BuildFailed      the built-in guest could not be put together; the message says what the host lacks
"""

from __future__ import annotations

from collections.abc import Iterable


class ImageError(Exception):
    """An image cannot be had."""


class ImageNotFound(ImageError):
    """No image has this name."""

    def __init__(self, name: str, known: Iterable[str], hint: str) -> None:
        self.name = name
        self.known = tuple(known)
        super().__init__(f"no image {name[:80]!r}; there is {', '.join(self.known) or 'none yet'}. {hint}")


class ImageCorrupt(ImageError):
    """An image's files cannot be used."""


class BuildFailed(ImageError):
    """The built-in guest could not be put together on this host."""
