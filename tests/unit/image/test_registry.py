from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vmherd.image.errors import ImageCorrupt, ImageError, ImageNotFound
from vmherd.image.registry import ImageRegistry, KernelImage

DESCRIPTION = {"version": "1-6.1", "command_line": "quiet", "default_cpus": 1, "default_memory_mib": 128}


def make_image(images: Path, name: str, **changes: Any) -> Path:
    directory = images / name
    directory.mkdir()
    for file in ("kernel", "initramfs"):
        (directory / file).write_bytes(b"\0")
    (directory / "image.json").write_text(json.dumps({**DESCRIPTION, **changes}))
    return directory


def test_it_finds_an_image_by_name(tmp_path: Path) -> None:
    directory = make_image(tmp_path, "builtin")
    assert ImageRegistry(tmp_path).get("builtin") == KernelImage(
        name="builtin",
        version="1-6.1",
        kernel=directory / "kernel",
        initramfs=directory / "initramfs",
        command_line="quiet",
        default_cpus=1,
        default_memory_mib=128,
    )


def test_it_sees_an_image_that_was_made_later(tmp_path: Path) -> None:
    registry = ImageRegistry(tmp_path / "images")
    assert registry.list() == []
    (tmp_path / "images").mkdir()
    make_image(tmp_path / "images", "late")
    assert [image.name for image in registry.list()] == ["late"]


def test_it_lists_images_by_name_and_nothing_else(tmp_path: Path) -> None:
    make_image(tmp_path, "b")
    make_image(tmp_path, "a")
    make_image(tmp_path, ".builtin-x7gq")  # a build that was interrupted
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert [image.name for image in ImageRegistry(tmp_path).list()] == ["a", "b"]


def test_an_unknown_image_is_answered_with_those_there_are(tmp_path: Path) -> None:
    make_image(tmp_path, "debian-12")
    with pytest.raises(ImageNotFound) as caught:
        ImageRegistry(tmp_path).get("builtin")
    assert str(caught.value) == ("no image 'builtin'; there is debian-12. `vmherd up` makes the built-in one")
    assert (caught.value.name, caught.value.known) == ("builtin", ("debian-12",))


@pytest.mark.parametrize("name", ["", ".", "..", "../images/a", "a/../a", "/a", "a/", "A", ".hidden", "a\n", "a" * 300])
def test_a_name_never_leads_out_of_the_images_directory(tmp_path: Path, name: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for directory in (tmp_path, images):
        make_image(directory, "a")
    with pytest.raises(ImageNotFound, match="there is a"):
        ImageRegistry(images).get(name)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"version": None}, "version must be of type str, is None"),
        ({"command_line": 5}, "command_line must be of type str, is 5"),
        ({"default_cpus": "1"}, "default_cpus must be of type int, is '1'"),
        ({"default_memory_mib": True}, "default_memory_mib must be of type int, is True"),
    ],
)
def test_a_wrong_description_is_named_with_its_field(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    make_image(tmp_path, "a", **changes)
    with pytest.raises(ImageCorrupt) as caught:
        ImageRegistry(tmp_path).get("a")
    assert str(caught.value) == f"{tmp_path}/a/image.json: {complaint}"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_description_must_be_a_json_object(tmp_path: Path, content: bytes) -> None:
    (make_image(tmp_path, "a") / "image.json").write_bytes(content)
    with pytest.raises(ImageCorrupt, match=r"image\.json"):
        ImageRegistry(tmp_path).get("a")


@pytest.mark.parametrize("file", ["kernel", "initramfs"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    path = make_image(tmp_path, "a") / file
    path.unlink()
    with pytest.raises(ImageCorrupt, match=str(path)):
        ImageRegistry(tmp_path).list()


def test_every_error_is_an_image_error() -> None:
    assert issubclass(ImageNotFound, ImageError)
    assert issubclass(ImageCorrupt, ImageError)
