"""The client: one channel, one stub for each service, and errors as `vmherd.model.errors` has them."""

from __future__ import annotations

import grp
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from vmherd.api.v1.controller_pb2 import ListRequest, ListResponse
from vmherd.api.v1.controller_pb2_grpc import ControllerServiceStub
from vmherd.api.v1.file_pb2_grpc import FileServiceStub
from vmherd.api.v1.guest_pb2_grpc import GuestServiceStub
from vmherd.api.v1.process_pb2_grpc import ProcessServiceStub
from vmherd.model.errors import Unavailable, VmherdError
from vmherd.rpc.channel import OPTIONS
from vmherd.rpc.status import from_rpc_error, status_of

_CONNECT_TIMEOUT_S = 1.0
_LIST_TIMEOUT_S = 10.0
_PAGE_SIZE = 1000


class Client:
    """The controller on a unix socket. Every call raises `VmherdError` where it fails.

    `instances`, `guest`, `processes` and `files` are the generated stubs, so each call also takes `timeout` in seconds.
    """

    def __init__(self, path: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix:{path}", options=OPTIONS)
        channel = grpc.intercept_channel(self._channel, _RaisesVmherdErrors(path))
        self.instances = ControllerServiceStub(channel)
        self.guest = GuestServiceStub(channel)
        self.processes = ProcessServiceStub(channel)
        self.files = FileServiceStub(channel)

    def pages(self, label_selector: Iterable[str] = ()) -> Iterator[ListResponse]:
        """The instances by name, page after page."""
        request = ListRequest(page_size=_PAGE_SIZE, label_selector=label_selector)
        while True:
            page = self.instances.List(request, timeout=_LIST_TIMEOUT_S)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def close(self) -> None:
        """Ends every call that is still open."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _RaisesVmherdErrors(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def __init__(self, path: Path) -> None:
        self._path = path

    def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        return self._answer(continuation(client_call_details, request))

    def intercept_stream_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.ClientCallDetails, request_iterator: Any
    ) -> Any:
        return self._answer(continuation(client_call_details, request_iterator))

    def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.ClientCallDetails, request: Any
    ) -> Any:
        return self._answers(continuation(client_call_details, request))

    def intercept_stream_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.ClientCallDetails, request_iterator: Any
    ) -> Any:
        return self._answers(continuation(client_call_details, request_iterator))

    def _answer(self, call: Any) -> Any:
        if (error := call.exception()) is not None:
            raise self._translated(error) from error
        return call

    def _answers(self, call: Any) -> Iterator[Any]:
        try:
            yield from call
        except grpc.RpcError as error:
            raise self._translated(error) from error
        finally:
            call.cancel()

    def _translated(self, error: Any) -> VmherdError:
        """gRPC's own text for a peer that is not there names neither the peer nor the reason."""
        if error.code() is grpc.StatusCode.UNAVAILABLE and not status_of(error).details:
            return Unavailable(
                f"no controller answers on {self._path}: {_why(self._path)}", reason="CONTROLLER_NOT_RUNNING"
            )
        return from_rpc_error(error)


def _why(path: Path) -> str:
    why = "it ended the connection"
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_TIMEOUT_S)
        try:
            probe.connect(os.fspath(path))
        except PermissionError as error:
            return f"{error.strerror}; {_who_may_connect(path)}"
        except OSError as error:
            why = error.strerror or str(error)
    return f"{why}; `./start.sh` or `vmherd up` starts one"


def _who_may_connect(path: Path) -> str:
    try:
        found = path.stat()
        group = grp.getgrgid(found.st_gid).gr_name
    except (OSError, KeyError):
        return "ask its owner"
    if not found.st_mode & stat.S_IWGRP:
        return "only the user who started it may connect"
    return f"only members of the group {group} may connect: `adduser NAME {group}` as root, then log in anew"
