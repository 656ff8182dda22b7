"""Texts of agents and programs, as they were seen, and what they mean."""

from __future__ import annotations

import pytest

from vmherd.guest_agent import CommandFailed
from vmherd.guest_agent.file_errors import (
    FileForbidden,
    FileMissing,
    FileUnsuitable,
    GuestFull,
    explained,
    refuse,
)

AGENT_TEXTS = {
    "failed to open file '/x' (mode: 'r'): No such file or directory": FileMissing,
    "failed to open file '/No space left on device' (mode: 'w'): Permission denied": FileForbidden,
    "failed to open file '/a: b' (mode: 'w'): Read-only file system": FileUnsuitable,
    "failed to open file '/' (mode: 'w'): Is a directory": FileUnsuitable,
    "failed to open file 'C:\\x': The system cannot find the file specified.": FileMissing,
    "failed to open file 'C:\\x': Access is denied.": FileForbidden,
    "failed to write to file: No space left on device": GuestFull,
    "failed to write to file: There is not enough space on the disk.\r\n": GuestFull,
    "failed to open file '/x' (mode: 'r'): Too many open files": GuestFull,
}
PROGRAM_TEXTS = {
    "stat: cannot statx '/f': No such file or directory\n": (FileMissing, "/f: No such file or directory"),
    "stat: can't stat '/f': Permission denied\n": (FileForbidden, "/f: Permission denied"),
    "sh: 1: cannot create /.vmherd-1: Directory nonexistent\n": (FileMissing, "/f: sh: 1: cannot create"),
    "mv: cannot move '/g' to '/f': Is a directory\n": (FileUnsuitable, "/f: Is a directory"),
    "tar: ./a/b: Cannot open: Permission denied\ntar: Exiting with failure status": (FileForbidden, "./a/b: Cannot"),
    "tar: write error: No space left on device": (GuestFull, "No space left"),
    "tar: This does not look like a tar archive\ntar: Exiting": (CommandFailed, "does not look like a tar archive"),
    "": (CommandFailed, "no reason given"),
}


@pytest.mark.parametrize("text", AGENT_TEXTS)
def test_what_an_agent_says(text: str) -> None:
    error = explained(CommandFailed("GenericError", text, command="guest-file-open", elapsed_s=0.5), "/f")
    assert type(error) is AGENT_TEXTS[text]
    assert error.message.startswith("/f: ")
    assert (error.command, error.elapsed_s) == ("guest-file-open", 0.5)


def test_what_no_table_knows_stays_as_it_is() -> None:
    error = CommandFailed("GenericError", "failed: by magic", command="guest-file-read", elapsed_s=0)
    assert explained(error, "/f") is error


@pytest.mark.parametrize("text", PROGRAM_TEXTS)
def test_what_a_program_says(text: str) -> None:
    kind, message = PROGRAM_TEXTS[text]
    with pytest.raises(kind) as caught:
        refuse(text, "/f")
    assert type(caught.value) is kind
    assert message in str(caught.value)
