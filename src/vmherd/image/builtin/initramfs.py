"""The tree of files that the built-in guest runs on, taken from unpacked Debian packages and from `guest/`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vmherd.image.builtin.compression import decompress
from vmherd.image.builtin.cpio import CharacterDevice, Directory, Entry, File, Link
from vmherd.image.builtin.kernel import load_order, needed_by, normal
from vmherd.image.builtin.packages import run
from vmherd.image.errors import BuildFailed

GUEST = Path(__file__).parent / "guest"
"""The guest's own files, at the places where the guest has them."""

TOOL_TIMEOUT_S = 10.0

_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_LOADER = "lib64/ld-linux-x86-64.so.2"
_BUSYBOX = "usr/bin/busybox"

_SKELETON: dict[str, Entry] = {
    # One directory for all programs: this guest has no use for the difference.
    "bin": Link("usr/bin"),
    "sbin": Link("usr/bin"),
    "usr/sbin": Link("bin"),
    "lib": Link("usr/lib"),
    "lib64": Link("usr/lib64"),
    "dev/console": CharacterDevice(5, 1),  # the kernel opens it for init before anything is mounted
    "proc": Directory(),
    "sys": Directory(),
    "run": Directory(),
    "tmp": Directory(0o1777),
    "root": Directory(0o700),
    "var/run": Link("../run"),
    "var/log": Directory(),
    "init": Link(_BUSYBOX),
}


def tree(packages: Path, kernel_release: str, version: str) -> dict[str, Entry]:
    """The whole tree, with an entry for each relative path.

    Raises:
        BuildFailed: the packages lack something that the guest needs.
    """
    return {
        **_SKELETON,
        **dict(_busybox(packages)),
        **dict(_agent(packages)),
        **dict(_modules(packages, kernel_release)),
        **dict(_own_files()),
        "etc/os-release": File(_os_release(kernel_release, version)),
    }


def _busybox(packages: Path) -> Iterator[tuple[str, Entry]]:
    busybox = _find(packages, "usr/bin/busybox", "bin/busybox")
    yield _BUSYBOX, _program(busybox)
    for applet in run([str(busybox), "--list"], timeout_s=TOOL_TIMEOUT_S).split():
        if applet != "busybox":
            yield f"usr/bin/{applet}", Link("busybox")


def _agent(packages: Path) -> Iterator[tuple[str, Entry]]:
    agent = _find(packages, "usr/sbin/qemu-ga", "usr/bin/qemu-ga")
    loader = _find(packages, _LOADER, f"usr/{_LOADER}")
    yield "usr/bin/qemu-ga", _program(agent)
    yield f"usr/{_LOADER}", _program(loader)
    # The packages' own loader says what it would load. No variants for newer CPUs: the guest's may be an old one.
    directories = ":".join(str(packages / each) for each in (_LIBRARIES, "lib/x86_64-linux-gnu"))
    only_baseline = ("--inhibit-cache", "--glibc-hwcaps-mask", "baseline", "--library-path", directories)
    listing = run([str(loader), *only_baseline, "--list", str(agent)], timeout_s=TOOL_TIMEOUT_S)
    for name, found in re.findall(r"^\t([^/\s]+) => (.+?)(?: \(0x[0-9a-f]+\))?$", listing, re.MULTILINE):
        if not Path(found).is_relative_to(packages):
            raise BuildFailed(f"qemu-ga needs {name}, which none of the fetched packages has")
        yield f"{_LIBRARIES}/{name}", File(Path(found).read_bytes())


def _modules(packages: Path, kernel_release: str) -> Iterator[tuple[str, Entry]]:
    root = _find(packages, f"usr/lib/modules/{kernel_release}", f"lib/modules/{kernel_release}")
    paths = {normal(path.name.partition(".")[0]): path for path in root.glob("kernel/**/*.ko*")}
    list_of_built_in = (root / "modules.builtin").read_text()
    built_in = {normal(Path(line).stem) for line in list_of_built_in.splitlines()}
    modules: dict[str, bytes] = {}

    def needs(name: str) -> list[str]:
        if name in built_in:
            return []
        if name not in paths:
            raise BuildFailed(f"the kernel {kernel_release} has no module {name}")
        modules[name] = decompress(paths[name].read_bytes(), f"the kernel module {name}")
        return [needed for needed in needed_by(modules[name]) if needed not in built_in]

    wanted = [normal(name) for name in (GUEST / "etc/modules").read_text().split()]
    order = [name for name in load_order(wanted, needs) if name in modules]
    place = f"usr/lib/modules/{kernel_release}"
    for name in order:
        yield f"{place}/{name}.ko", File(modules[name])
    dependencies = {name: load_order([name], needs)[:-1] for name in order}
    # modprobe loads what a line names from right to left.
    lines = (f"{name}.ko: {' '.join(f'{each}.ko' for each in reversed(dependencies[name]))}\n" for name in order)
    yield f"{place}/modules.dep", File("".join(lines).encode())
    yield f"{place}/modules.builtin", File(list_of_built_in.encode())


def _own_files() -> Iterator[tuple[str, Entry]]:
    for path in GUEST.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            yield path.relative_to(GUEST).as_posix(), File(data, 0o755 if data.startswith(b"#!") else 0o644)


def _os_release(kernel_release: str, version: str) -> bytes:
    """What `guest-get-osinfo` answers: https://www.freedesktop.org/software/systemd/man/os-release.html"""
    return (
        'NAME="vmherd built-in guest"\n'
        "ID=vmherd-builtin\n"
        f'VERSION="{version}"\n'
        f'VERSION_ID="{version}"\n'
        f'PRETTY_NAME="vmherd built-in guest {version} (Linux {kernel_release})"\n'
    ).encode()


def _program(path: Path) -> File:
    return File(path.read_bytes(), 0o755)


def _find(packages: Path, *places: str) -> Path:
    """The first of some places that exists; where exactly a package puts a file differs between releases."""
    for place in places:
        if (packages / place).exists():
            return packages / place
    raise BuildFailed(f"none of the fetched packages has {places[0]}")
