from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.framework import newc
from vmherd.image.builtin.cpio import CharacterDevice, Directory, Entry, File, Link, archive

TREE: dict[str, Entry] = {
    "usr/bin/sh": File(b"#!", 0o755),
    "etc/motd": File(b"hello"),
    "bin": Link("usr/bin"),
    "tmp": Directory(0o1777),
    "dev/console": CharacterDevice(5, 1),
}


def test_it_holds_every_entry_with_its_kind_permissions_and_content() -> None:
    records = newc.read(archive(TREE))
    assert {name: (record.mode, record.content) for name, record in records.items()} == {
        "bin": (stat.S_IFLNK | 0o777, b"usr/bin"),
        "dev": (stat.S_IFDIR | 0o755, b""),
        "dev/console": (stat.S_IFCHR | 0o600, b""),
        "etc": (stat.S_IFDIR | 0o755, b""),
        "etc/motd": (stat.S_IFREG | 0o644, b"hello"),
        "tmp": (stat.S_IFDIR | 0o1777, b""),
        "usr": (stat.S_IFDIR | 0o755, b""),
        "usr/bin": (stat.S_IFDIR | 0o755, b""),
        "usr/bin/sh": (stat.S_IFREG | 0o755, b"#!"),
    }
    assert records["dev/console"].device == (5, 1)


def test_nothing_in_it_depends_on_the_host_or_the_day() -> None:
    for record in newc.read(archive(TREE)).values():
        assert (record.uid, record.gid, record.modified) == (0, 0, 0)


def test_no_two_entries_are_links_of_one_file() -> None:
    records = newc.read(archive(TREE))
    assert len({record.inode for record in records.values()}) == len(records)


def test_the_same_tree_gives_the_same_bytes_in_whatever_order() -> None:
    assert archive(dict(reversed(TREE.items()))) == archive(TREE)


segments = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=9).filter(
    lambda segment: segment not in (".", "..")
)
paths = st.lists(segments, min_size=1, max_size=4).map("/".join)


@given(st.dictionaries(paths, st.binary(max_size=9)))
def test_every_file_comes_back_and_after_its_directories(contents: dict[str, bytes]) -> None:
    tree: dict[str, Entry] = {
        path: File(content)
        for path, content in contents.items()
        if not any(other.startswith(f"{path}/") for other in contents)
    }
    records = newc.read(archive(tree))
    for path, entry in tree.items():
        assert isinstance(entry, File)
        assert records[path].content == entry.data
    seen = {""}
    for path in records:
        assert path.rpartition("/")[0] in seen
        seen.add(path)


@pytest.mark.parametrize("path", ["", ".", "/etc", "../etc", "a/../b", "a//b", "a/", "./a", "a\0b"])
def test_a_path_must_be_plain_and_relative(path: str) -> None:
    with pytest.raises(ValueError, match="not a plain relative path"):
        archive({path: File(b"")})


@pytest.mark.parametrize("parent", [File(b""), Link("b"), CharacterDevice(1, 3)])
def test_nothing_lies_below_what_is_no_directory(parent: Entry) -> None:
    with pytest.raises(ValueError, match="'a/b/c' lies below 'a', which is no directory"):
        archive({"a/b/c": File(b""), "a": parent})
