"""Fetches Debian packages with the host's own apt, as an ordinary user, and unpacks them without installing them.

Signatures and hashes are checked by apt, against the host's own sources.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmherd.image.errors import BuildFailed

APT_TIMEOUT_S = 600.0
UNPACK_TIMEOUT_S = 120.0

_TOOLS = ("apt-cache", "apt-get", "dpkg-deb")
# With no package installed, apt's answers depend on its lists alone and not on this host.
_NOTHING_INSTALLED = ("-o", "Dir::State::status=/dev/null")
_DEPENDENCY = re.compile(r" [ |](?:Pre)?Depends: ([^<\s]+)")
_FIELD = re.compile(r"^(Package|Version|Architecture): (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Package:
    """A package that was fetched."""

    name: str
    version: str
    file: Path


def fetch(wanted: Sequence[str], keep: re.Pattern[str], cache_dir: Path) -> list[Package]:
    """Those among the wanted packages and all they depend on that `keep` matches, by name.

    A dependency that `keep` does not match is not followed either. The host's package lists are used when they are
    there and their packages can still be had; otherwise lists are fetched into the cache directory.

    Raises:
        BuildFailed: the host has no apt, or apt cannot get the packages.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise BuildFailed(f"{', '.join(missing)} not found: the built-in guest needs a Debian or Ubuntu host")
    directory = cache_dir / "packages"
    directory.mkdir(parents=True, exist_ok=True)
    try:
        packages = _download(wanted, keep, directory, _NOTHING_INSTALLED)
    except BuildFailed as error:
        packages = _download_with_own_lists(wanted, keep, directory, cache_dir / "apt", complaints=[str(error)])
    for old in set(directory.iterdir()).difference(package.file for package in packages):
        old.unlink()
    return packages


def unpack(packages: Iterable[Package], directory: Path) -> None:
    """Unpacks packages into one directory.

    Raises:
        BuildFailed: a package cannot be unpacked.
    """
    for package in packages:
        run(["dpkg-deb", "-x", str(package.file), str(directory)], timeout_s=UNPACK_TIMEOUT_S)


def follow(wanted: Sequence[str], listing: str, keep: re.Pattern[str]) -> list[str]:
    """The names among the wanted packages and all they depend on that `keep` matches.

    `listing` is what `apt-cache depends --recurse` prints.

    Raises:
        BuildFailed: a wanted package is not in the listing.
    """
    depends: dict[str, list[str]] = {}
    package = ""
    for line in listing.splitlines():
        if not line.startswith(" "):
            package = line
            depends[package] = []
        elif dependency := _DEPENDENCY.fullmatch(line):
            depends[package].append(dependency[1])
    if unknown := [name for name in wanted if name not in depends]:
        raise BuildFailed(f"apt knows no package {', '.join(unknown)}")
    names = list(wanted)
    for name in names:  # it grows while it is read
        names += [each for each in depends.get(name, ()) if keep.fullmatch(each) and each not in names]
    return [name for name in names if keep.fullmatch(name)]


def _download(wanted: Sequence[str], keep: re.Pattern[str], directory: Path, options: Sequence[str]) -> list[Package]:
    def apt(tool: str, *words: str) -> str:
        return run([tool, *options, *words], timeout_s=APT_TIMEOUT_S, directory=directory)

    names = follow(wanted, apt("apt-cache", "depends", "--recurse", "--important", *wanted), keep)
    records = apt("apt-cache", "show", "--no-all-versions", *names).split("\n\n")
    packages = [_package(dict(_FIELD.findall(record)), directory) for record in records if record.strip()]
    # A file that is already there and whole is not fetched again.
    apt("apt-get", "download", *(f"{package.name}={package.version}" for package in packages))
    return sorted(packages, key=lambda package: package.name)


def _download_with_own_lists(
    wanted: Sequence[str], keep: re.Pattern[str], directory: Path, lists: Path, complaints: list[str]
) -> list[Package]:
    for part in ("state/lists/partial", "cache/archives/partial"):
        (lists / part).mkdir(parents=True, exist_ok=True)
    options = ("-o", f"Dir::State={lists}/state", "-o", f"Dir::Cache={lists}/cache")
    try:
        run(["apt-get", *options, "-o", "APT::Update::Error-Mode=any", "update"], timeout_s=APT_TIMEOUT_S)
    except BuildFailed as error:  # it may be about another repository than the one that is needed
        complaints.append(str(error))
    try:
        return _download(wanted, keep, directory, (*options, *_NOTHING_INSTALLED))
    except BuildFailed as error:
        raise BuildFailed("\n".join((*complaints, str(error)))) from error


def _package(record: dict[str, str], directory: Path) -> Package:
    name, version, architecture = record["Package"], record["Version"], record["Architecture"]
    # That is how `apt-get download` names its files.
    return Package(name, version, directory / f"{name}_{version.replace(':', '%3a')}_{architecture}.deb")


def run(words: Sequence[str], *, timeout_s: float, directory: Path | None = None) -> str:
    """Runs one of the host's tools to its end and gives what it printed.

    Raises:
        BuildFailed: it cannot be started, says that it failed, or takes too long.
    """
    tool = Path(words[0]).name
    try:
        process = subprocess.run(
            words,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except OSError as error:
        raise BuildFailed(f"cannot start {words[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"{tool} did not end within {timeout_s:g} s") from error
    if process.returncode:
        raise BuildFailed(f"{tool} failed: {process.stderr.strip() or f'it ended with {process.returncode}'}")
    return process.stdout
