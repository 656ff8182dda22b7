"""The gateway as a whole: its routes, and the HTTP server that they run on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Collection, Generator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import structlog
import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from vmherd.api.settings.v1.settings_pb2 import GatewaySettings
from vmherd.gateway import descriptors, docs, openapi, transcoder
from vmherd.gateway.admission import Admission
from vmherd.gateway.errors import error_response
from vmherd.gateway.files import FilesRoute
from vmherd.gateway.routes import Closing, RpcRoute
from vmherd.gateway.upstream import Upstream
from vmherd.model.errors import FailedPrecondition, FieldViolation, InvalidArgument, NotFound, Unimplemented
from vmherd.rpc.serving import check_socket_path, serve_until_signalled
from vmherd.rpc.status import to_status
from vmherd.rpc.token import read_token

MAX_BODY_BYTES = 1024 * 1024
SHUTDOWN_TIMEOUT_S = 1
"""How long connections may take to end once the gateway shuts down; a client that reads nothing is cut off then."""


_log = structlog.get_logger()


def create_app(
    api: descriptors.Api,
    upstream: Upstream,
    closing: Closing,
    *,
    hosts: Collection[str],
    token: str | None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The gateway's routes: one for each binding of each RPC, the page that describes them, and its health.

    Requests may come in under the names in `hosts` and the loopback's. A token of None lets everybody in.
    """
    bindings = transcoder.bindings(api)
    description = json.dumps(openapi.document(api, bindings, needs_token=token is not None), ensure_ascii=False)

    async def describe(_request: Request) -> Response:
        return Response(description, media_type="application/json")

    async def healthy(_request: Request) -> Response:
        return JSONResponse({"status": "SERVING"})

    async def ready(_request: Request) -> Response:
        try:
            await upstream.check_ready()
        except Exception as error:
            return error_response(upstream.status(error, "readyz"))
        return JSONResponse({"status": "SERVING"})

    public = {"/healthz": healthy, "/readyz": ready, "/openapi.json": describe, **docs.ENDPOINTS}
    app = FastAPI(
        openapi_url=None,  # FastAPI's own description would know nothing of protos
        redirect_slashes=False,
        exception_handlers={HTTPException: _refuse},
        middleware=[Middleware(Admission, hosts=hosts, token=token, public=public)],
    )
    # `{name}` matches `name:verb` as well, so the more special template is tried first.
    for binding in sorted(bindings, key=lambda it: it.template.order):
        app.router.routes.append(RpcRoute(binding, api.pool, upstream, closing, max_body_bytes))
    app.router.routes.append(FilesRoute(api.pool, upstream, closing))
    for path, endpoint in public.items():
        app.add_route(path, endpoint)
    return app


async def _refuse(request: Request, _error: Exception) -> Response:
    """Answers where no route fits, which is all that the router refuses by itself."""
    path = request.scope["path"][:255]
    fitting = (route for route in request.app.router.routes if route.matches(request.scope)[0] is not Match.NONE)
    if methods := {method for route in fitting for method in route.methods}:
        allowed = ", ".join(sorted(methods))
        error = Unimplemented(f"{path!r} takes {allowed}, not {request.method}", reason="METHOD_NOT_ALLOWED")
        return error_response(to_status(error), {"Allow": allowed})
    return error_response(to_status(NotFound(f"there is nothing at {path!r}; see /docs", reason="ROUTE_NOT_FOUND")))


@contextlib.asynccontextmanager
async def serving(settings: GatewaySettings, *, address_file: Path | None = None) -> AsyncIterator[str]:
    """Serves HTTP as the settings say, and yields its address as HOST:PORT, which the address file holds meanwhile.

    It ends within 2 s of the context being left: streams at once, other calls when they are answered or out of time.

    Raises:
        InvalidArgument: a setting is missing or wrong.
        FailedPrecondition: the address, the token or the address file cannot be had.
    """
    host, port = _check(settings)
    token = None if settings.no_token else read_token(Path(settings.token_file))
    with await _listener(host, port) as listener:
        closing, upstream = Closing(), Upstream(Path(settings.controller))
        app = create_app(
            descriptors.load(descriptors.built_in()),
            upstream,
            closing,
            hosts=[settings.listen, *settings.allowed_hosts],
            token=token,
            max_body_bytes=settings.max_body_bytes or MAX_BODY_BYTES,
        )
        server = _Server(_config(app))
        serve = asyncio.create_task(server.serve([listener]))
        log_connection = asyncio.create_task(upstream.log_connection())
        try:
            await server.accepting.wait()
            address = _address_of(listener)
            with _written(address_file, address):
                _log.info("serving", address=address, controller=settings.controller)
                yield address
        finally:
            closing.begin()
            server.should_exit = True
            await serve
            log_connection.cancel()
            await asyncio.wait({log_connection})
            await upstream.close()


async def run(settings: GatewaySettings, *, address_file: Path | None = None) -> None:
    """Serves HTTP, as `serving` does, until it is asked to end by a signal."""
    async with serving(settings, address_file=address_file) as address:
        await serve_until_signalled(f"serving on http://{address}")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leaves signals to the caller; uvicorn would take SIGTERM and SIGINT for itself."""
        yield


def _config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
    )


def _check(settings: GatewaySettings) -> tuple[str, int]:
    """The host and the port to listen on, once every setting was looked at."""
    wrong = []
    address = _host_and_port(settings.listen)
    if address is None:
        wrong.append(FieldViolation("listen", f"expected HOST:PORT, got {settings.listen!r}"))
    if not settings.controller:
        wrong.append(FieldViolation("controller", "expected the path of the controller's socket"))
    if not settings.token_file and not settings.no_token:
        wrong.append(FieldViolation("token_file", "expected the path of a file with the bearer token, or `no_token`"))
    if wrong or address is None:
        raise InvalidArgument.of(wrong)
    check_socket_path(Path(settings.controller))
    return address


def _host_and_port(listen: str) -> tuple[str, int] | None:
    with contextlib.suppress(ValueError):
        parts = urlsplit(f"//{listen}")
        if parts.hostname and parts.port is not None and parts.netloc == listen:
            return parts.hostname, parts.port
    return None


async def _listener(host: str, port: int) -> socket.socket:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        # With its protocol left out, asyncio would not set TCP_NODELAY and every answer would wait 40 ms for an ACK.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not to wait for old connections' TIME_WAIT
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise FailedPrecondition(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another address, or end who has this one",
            reason="ADDRESS_NOT_AVAILABLE",
        ) from error
    return listener


def _address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def _written(path: Path | None, address: str) -> Iterator[None]:
    if path is None:
        yield
        return
    unfinished = path.with_name(f"{path.name}.new")
    try:
        unfinished.write_text(f"{address}\n")
        unfinished.replace(path)
    except OSError as error:
        why = f"cannot write the address file {path}: {error.strerror}"
        raise FailedPrecondition(why, reason="ADDRESS_FILE_NOT_WRITABLE") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
