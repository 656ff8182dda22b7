"""The images of a state directory: a directory for each, described by the `image.json` in it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vmherd.image.errors import ImageCorrupt, ImageNotFound

DESCRIPTION = "image.json"
"""The file that makes a directory an image. It is written last."""

_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,61}[a-z0-9])?")
_HINT = "`vmherd up` makes the built-in one"


T = TypeVar("T")


@dataclass(frozen=True)
class KernelImage:
    """An image that QEMU boots directly, without a disk and a boot loader."""

    name: str
    version: str
    kernel: Path
    initramfs: Path
    command_line: str
    default_cpus: int
    default_memory_mib: int


class ImageRegistry:
    """Looks images up by name. It reads the disk at each call, so an image is there as soon as it is made."""

    def __init__(self, images_dir: Path) -> None:
        self.images_dir = images_dir

    def get(self, name: str) -> KernelImage:
        """The image with this name.

        Raises:
            ImageNotFound: there is none.
            ImageCorrupt: its files cannot be used.
        """
        if not _NAME.fullmatch(name) or not (self.images_dir / name / DESCRIPTION).exists():
            raise ImageNotFound(name, self._names(), _HINT)
        return read_image(self.images_dir / name)

    def _names(self) -> list[str]:
        names = (path.parent.name for path in self.images_dir.glob(f"*/{DESCRIPTION}"))
        return sorted(name for name in names if _NAME.fullmatch(name))

    def list(self) -> list[KernelImage]:
        """All images, by name.

        Raises:
            ImageCorrupt: the files of one of them cannot be used.
        """
        return [read_image(self.images_dir / name) for name in self._names()]


def read_image(directory: Path) -> KernelImage:
    """The image in a directory.

    Raises:
        ImageCorrupt: its description or a file that this names is missing or not as it must be.
    """
    description = read_description(directory)
    image = KernelImage(
        name=directory.name,
        version=_field(directory, description, "version", str),
        kernel=directory / "kernel",
        initramfs=directory / "initramfs",
        command_line=_field(directory, description, "command_line", str),
        default_cpus=_field(directory, description, "default_cpus", int),
        default_memory_mib=_field(directory, description, "default_memory_mib", int),
    )
    for path in (image.kernel, image.initramfs):
        if not path.is_file():
            raise ImageCorrupt(f"the image {image.name} has no file {path}; remove {directory} and make it anew")
    return image


def read_description(directory: Path) -> dict[str, Any]:
    """What an image's `image.json` says.

    Raises:
        ImageCorrupt: it cannot be read, or is not a JSON object.
    """
    path = directory / DESCRIPTION
    try:
        description = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ImageCorrupt(f"cannot read {path}: {error}") from error
    if not isinstance(description, dict):
        raise ImageCorrupt(f"{path} holds no JSON object")
    return description


def _field(directory: Path, description: dict[str, Any], key: str, kind: type[T]) -> T:
    value = description.get(key)
    if type(value) is not kind:  # a bool is an int, but no number of CPUs
        raise ImageCorrupt(f"{directory / DESCRIPTION}: {key} must be of type {kind.__name__}, is {value!r}")
    return value
