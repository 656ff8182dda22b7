"""`python -m vmherd.image.builtin --images-dir DIR` makes the built-in guest."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from vmherd.image.builtin import build_builtin
from vmherd.image.errors import ImageError
from vmherd.image.registry import read_description

_SHOWN = ("linux-image-", "linux-modules-", "busybox", "qemu-guest-agent")


def main() -> int:
    """Makes the built-in guest and says what it is made of."""
    parser = argparse.ArgumentParser(prog="python -m vmherd.image.builtin", description="Makes the built-in guest.")
    parser.add_argument("--images-dir", type=Path, required=True, help="the directory that holds the images")
    parser.add_argument("--cache-dir", type=Path, help="where packages are kept between builds; the user's own cache")
    parser.add_argument("--fresh", action="store_true", help="make it anew, from the newest packages")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        image = build_builtin(options.images_dir, cache_dir=options.cache_dir, fresh=options.fresh)
    except (ImageError, OSError) as error:
        print(f"cannot make the built-in guest: {error}", file=sys.stderr)
        return 1
    directory = image.kernel.parent
    print(f"built-in guest {image.version} in {directory} ({time.monotonic() - started:.1f} s)")
    for path in (image.kernel, image.initramfs):
        print(f"  {path.name:<10} {path.stat().st_size / 1e6:5.1f} MB")
    for name, version in read_description(directory)["packages"].items():
        if name.startswith(_SHOWN):
            print(f"  {name} {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
