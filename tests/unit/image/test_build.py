"""What is built when, with a build that takes no time; tests/integration/image has the real one."""

from __future__ import annotations

import json
import os
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vmherd.image.builtin import build
from vmherd.image.builtin.build import build_builtin
from vmherd.image.errors import BuildFailed


class Builder:
    """Stands in for the part that takes seconds. Each build has another content."""

    def __init__(self) -> None:
        self.builds = 0
        self.before_the_end: Callable[[], object] = lambda: None

    def __call__(self, directory: Path, _: Path, fingerprint: str) -> None:
        self.builds += 1
        (directory / "kernel").write_text(f"kernel {self.builds}")
        (directory / "initramfs").write_text("initramfs")
        self.before_the_end()
        description = {"version": "1", "command_line": "", "default_cpus": 1, "default_memory_mib": 128}
        (directory / "image.json").write_text(json.dumps({**description, "fingerprint": fingerprint}))


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    builder = Builder()
    monkeypatch.setattr(build, "_build", builder)
    return builder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path / "state" / "images"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_it_is_built_once_and_copied_for_each_images_directory(builder: Builder, images: Path, cache: Path) -> None:
    first = build_builtin(images, cache_dir=cache)
    second = build_builtin(images.with_name("other"), cache_dir=cache)
    assert builder.builds == 1
    assert first.kernel == images / "builtin" / "kernel"
    assert first.kernel.read_text() == second.kernel.read_text() == "kernel 1"
    # The helper refuses files with more than one link.
    assert first.kernel.stat().st_nlink == 1
    assert names(images) == names(cache) == ["builtin"]


def test_one_that_is_there_is_given_without_touching_anything(builder: Builder, images: Path, cache: Path) -> None:
    first = build_builtin(images, cache_dir=cache)
    elsewhere = cache.with_name("another-cache")
    assert build_builtin(images, cache_dir=elsewhere) == first
    assert builder.builds == 1
    assert not elsewhere.exists()


def test_another_recipe_makes_it_anew(
    builder: Builder, images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_builtin(images, cache_dir=cache)
    monkeypatch.setattr(build, "_fingerprint", lambda: "another")
    assert build_builtin(images, cache_dir=cache).kernel.read_text() == "kernel 2"
    assert names(images) == names(cache) == ["builtin"]


def test_fresh_makes_it_anew(builder: Builder, images: Path, cache: Path) -> None:
    build_builtin(images, cache_dir=cache)
    assert build_builtin(images, cache_dir=cache, fresh=True).kernel.read_text() == "kernel 2"


@pytest.mark.parametrize("file", ["kernel", "initramfs", "image.json"])
def test_a_damaged_one_is_replaced(builder: Builder, images: Path, cache: Path, file: str) -> None:
    build_builtin(images, cache_dir=cache)
    (images / "builtin" / file).unlink()
    assert build_builtin(images, cache_dir=cache).kernel.read_text() == "kernel 1"
    assert builder.builds == 1


def test_a_build_that_fails_changes_nothing(
    builder: Builder, images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise BuildFailed("no network")

    image = build_builtin(images, cache_dir=cache)
    monkeypatch.setattr(build, "_fingerprint", lambda: "another")
    builder.before_the_end = fail
    with pytest.raises(BuildFailed, match="no network"):
        build_builtin(images, cache_dir=cache)
    assert image.kernel.read_text() == "kernel 1"
    assert names(images) == names(cache) == ["builtin"]


def test_what_a_killed_build_left_behind_is_removed_and_never_used(builder: Builder, images: Path, cache: Path) -> None:
    for directory in (images, cache):
        left_over = directory / ".builtin-k1ll3d" / "new"
        left_over.mkdir(parents=True)
        (left_over / "kernel").write_text("half a ker")
    assert build_builtin(images, cache_dir=cache).kernel.read_text() == "kernel 1"
    assert names(images) == names(cache) == ["builtin"]


def test_two_builds_at_once_build_once(builder: Builder, images: Path, cache: Path) -> None:
    other_waits = threading.Event()
    builder.before_the_end = lambda: other_waits.wait(timeout=60)

    def second() -> Path:
        other_waits.set()
        return build_builtin(images, cache_dir=cache).kernel

    with ThreadPoolExecutor(max_workers=2) as pool:
        first = pool.submit(build_builtin, images, cache_dir=cache)
        assert pool.submit(second).result(timeout=60) == first.result(timeout=60).kernel
    assert builder.builds == 1


def test_a_lock_that_is_never_given_back_is_an_error(
    builder: Builder, images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "LOCK_TIMEOUT_S", 0.1)
    failures: list[str] = []

    def other() -> None:
        with pytest.raises(BuildFailed) as caught:
            build_builtin(images.with_name("other"), cache_dir=cache)
        failures.append(str(caught.value))

    builder.before_the_end = other
    build_builtin(images, cache_dir=cache)
    assert failures == [f"another build has been at work in {cache} for too long"]


def test_one_directory_may_be_both(builder: Builder, images: Path) -> None:
    assert build_builtin(images, cache_dir=images).kernel.read_text() == "kernel 1"
    assert build_builtin(images, cache_dir=images, fresh=True).kernel.read_text() == "kernel 2"


def test_others_may_read_it_whatever_the_umask(builder: Builder, images: Path, cache: Path) -> None:
    before = os.umask(0o077)
    try:
        image = build_builtin(images, cache_dir=cache)
    finally:
        os.umask(before)
    assert image.kernel.parent.stat().st_mode & 0o777 == 0o755
    assert image.kernel.stat().st_mode & 0o777 == 0o644


def test_the_fingerprint_is_that_of_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = tmp_path / "builtin"
    (recipe / "guest" / "etc").mkdir(parents=True)
    (recipe / "build.py").write_text("the recipe")
    (recipe / "guest" / "etc" / "inittab").write_text("::sysinit:a")
    monkeypatch.setattr(build, "__file__", str(recipe / "build.py"))
    seen = {build._fingerprint()}
    assert {build._fingerprint()} == seen
    for change in (
        lambda: (recipe / "build.py").write_text("another recipe"),
        lambda: (recipe / "guest" / "etc" / "inittab").write_text("::sysinit:b"),
        lambda: (recipe / "guest" / "etc" / "inittab").rename(recipe / "guest" / "inittab"),
        lambda: monkeypatch.setattr(build, "_os_release", lambda: {"ID": "debian", "VERSION_ID": "99"}),
    ):
        change()
        assert build._fingerprint() not in seen
        seen.add(build._fingerprint())
    (recipe / "__pycache__").mkdir()
    (recipe / "__pycache__" / "build.cpython-311.pyc").write_bytes(b"\0")
    assert build._fingerprint() in seen


@pytest.mark.parametrize(
    ("release", "package"),
    [
        ({"ID": "debian"}, "linux-image-cloud-amd64"),
        ({"ID": "ubuntu", "ID_LIKE": "debian"}, "linux-image-virtual"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "linux-image-virtual"),
    ],
)
def test_the_kernel_is_the_distribution_s(
    monkeypatch: pytest.MonkeyPatch, release: dict[str, str], package: str
) -> None:
    monkeypatch.setattr(build, "_os_release", lambda: release)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert build._kernel_package() == package


def test_other_hosts_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_os_release", lambda: {"ID": "fedora"})
    with pytest.raises(BuildFailed, match="needs a Debian or Ubuntu host, this one is 'fedora'"):
        build._kernel_package()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(BuildFailed, match="made for x86_64 hosts, this one is aarch64"):
        build._kernel_package()


@pytest.mark.parametrize(
    ("uid", "xdg", "expected"),
    [(0, "/x", "/var/cache/vmherd"), (1000, "/x", "/x/vmherd"), (1000, "", "/home/a/.cache/vmherd")],
)
def test_each_user_has_a_cache(monkeypatch: pytest.MonkeyPatch, uid: int, xdg: str, expected: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", "/home/a")
    assert build.default_cache_dir() == Path(expected)
