"""`vmherd cp`: files between this side and a guest, over gRPC."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Iterator
from typing import Annotated, TextIO

import typer

from vmherd.api.v1 import file_pb2
from vmherd.api.v1.file_pb2 import ReadFileRequest, WriteFileHeader, WriteFileRequest
from vmherd.cli import copying
from vmherd.cli.exit_codes import FAILED
from vmherd.cli.report import printable, to_json
from vmherd.cli.session import Session, connected
from vmherd.client import Client
from vmherd.guest_agent.files import FileDescription, FileDigest
from vmherd.model.errors import InvalidArgument

DESCRIBE_TIMEOUT_S = 60.0

app = typer.Typer()


class GrpcFiles:
    """The files of an instance, asked for over gRPC: `copying.Files`."""

    def __init__(self, client: Client, name: str) -> None:
        self._stub = client.files
        self._name = name

    def describe(self, path: str) -> FileDescription:
        """See `copying.Files`."""
        request = ReadFileRequest(name=self._name, path=path, describe_only=True)
        [answer] = self._stub.ReadFile(request, timeout=DESCRIBE_TIMEOUT_S)
        return _description(answer.description)

    def read(self, path: str, *, archive: bool) -> Generator[FileDescription | bytes | FileDigest]:
        """See `copying.Files`."""
        for part in self._stub.ReadFile(ReadFileRequest(name=self._name, path=path, archive=archive)):
            match part.WhichOneof("part"):
                case "description":
                    yield _description(part.description)
                case "data":
                    yield part.data
                case "digest":
                    yield _digest(part.digest)

    def write(
        self, path: str, pieces: Iterable[bytes], *, archive: bool, mode: int | None, size_bytes: int | None
    ) -> FileDigest:
        """See `copying.Files`."""
        header = WriteFileHeader(name=self._name, path=path, archive=archive, mode=mode, size_bytes=size_bytes)
        failures: list[Exception] = []

        def requests() -> Iterator[WriteFileRequest]:
            # gRPC takes them in a thread of its own, which can tell nobody why they cease; without the end all is void.
            yield WriteFileRequest(header=header)
            try:
                for piece in pieces:
                    yield WriteFileRequest(data=piece)
                yield WriteFileRequest(end=True)
            except Exception as error:
                failures.append(error)

        try:
            return _digest(self._stub.WriteFile(requests()).digest)
        finally:
            for failure in failures:
                raise failure


@app.command("cp", rich_help_panel="Guests")
@connected
def cp(
    session: Session,
    *,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="`NAME:/path` in a guest, a path here, or `-`.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Where it goes, in the same forms.")],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Copy a folder and all that is in it.")] = False,
) -> None:
    """Copies a file or a folder out of a guest or into it.

    Where the target is a folder the copy gets the source's name in it. With -r, `SOURCE/.` means what is in the folder,
    and `-` a tar archive. The guest's SHA-256 is compared, and a file appears under its name when all of it is there.
    """
    places = copying.place(source), copying.place(target)
    guests = [place for place in places if place.is_guest]
    if len(guests) != 1:
        raise InvalidArgument("one of SOURCE and TARGET has to be in a guest, as NAME:/path, and the other one here")
    if not guests[0].guest:
        raise InvalidArgument(f"which guest? NAME:{guests[0].path}")
    copied = copying.copy(*places, GrpcFiles(session.client, guests[0].guest), recursive=recursive)
    report(copied, as_json=session.as_json, to=sys.stderr if target == copying.STDIO else sys.stdout)


def report(copied: copying.Copied, *, as_json: bool, to: TextIO) -> None:
    """Says what is to be said of a copy, JSON there `to`; exits with an error if something was left out."""
    digest = copied.digest
    if as_json:
        message = file_pb2.FileDigest(
            size_bytes=digest.size_bytes, sha256=digest.sha256, verified=digest.verified, notice=digest.notice
        )
        print(to_json(message), file=to)
    elif digest.notice:
        print(f"vmherd: {printable(digest.notice)}", file=sys.stderr)
    for what in copied.left_out:
        print(f"vmherd: left out: {printable(what)}", file=sys.stderr)
    if copied.left_out:
        raise typer.Exit(FAILED)


def _description(message: file_pb2.FileDescription) -> FileDescription:
    return FileDescription(
        path=message.path,
        is_folder=message.is_folder,
        size_bytes=message.size_bytes if message.HasField("size_bytes") else None,
        mode=message.mode if message.HasField("mode") else None,
        modified_s=message.modify_time.seconds if message.HasField("modify_time") else None,
        notice=message.notice,
    )


def _digest(message: file_pb2.FileDigest) -> FileDigest:
    return FileDigest(message.size_bytes, message.sha256, message.verified, message.notice)
