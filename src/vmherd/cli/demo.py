"""`vmherd demo`: the life of one instance through the HTTP API, and the proof that nothing of it is left.

`story` is what a program of your own may look like: it needs an address, a token and the standard library.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from vmherd.cli import traces
from vmherd.cli.exit_codes import INTERRUPTED
from vmherd.cli.herd_files import Flags
from vmherd.cli.processes import TAIL_LINES, race
from vmherd.cli.report import printable
from vmherd.cli.show import open_console
from vmherd.cli.up import herd_up
from vmherd.model.errors import Aborted, VmherdError
from vmherd.model.layout import Herd
from vmherd.rpc.serving import until_signalled

CALL_TIMEOUT_S = 120.0
NAME = "demo"
LABEL_WIDTH = 10

app = typer.Typer()


@app.command(rich_help_panel="Processes")
def demo() -> None:
    """Boots a machine, talks to its guest agent, and leaves nothing behind."""
    asyncio.run(_demo(open_console()))


@dataclass(frozen=True)
class Api:
    """vmherd's HTTP API with nothing but the standard library."""

    address: str
    token: str

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The answer to one request.

        Raises:
            Aborted: there is no answer, or it is an error.
        """
        with self._answer(method, path, body) as answer:
            return json.load(answer)

    def stream(self, path: str) -> Iterator[Any]:
        """The messages of a stream as they come, one a line.

        Raises:
            Aborted: there is no answer, or it is an error or ends with one.
        """
        with self._answer("GET", path) as answer:
            for line in answer:
                message = json.loads(line)
                if "error" in message:
                    raise Aborted(f"GET {path}: {message['error']['message']}")
                yield message["result"]

    @contextlib.contextmanager
    def _answer(self, method: str, path: str, body: object = None) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.address, timeout=CALL_TIMEOUT_S)
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status != http.HTTPStatus.OK:
                raise Aborted(f"{method} {path}: {answer.status} {json.load(answer)['message']}")
            yield answer
        except (OSError, http.client.HTTPException) as error:
            raise Aborted(f"{method} {path}: {error}") from error
        finally:
            connection.close()


@dataclass
class Teller:
    """Prints what happens, each line under the step that it belongs to."""

    console: Console
    started_at_s: float = field(default_factory=time.monotonic)

    def step(self, name: str, *lines: str) -> None:
        """A step, and what came of it."""
        for index, line in enumerate(lines):
            label = name if index == 0 else ""
            self.console.print(Text.assemble((f"{label:<{LABEL_WIDTH}}", "bold cyan"), line), soft_wrap=True)


def story(api: Api, tell: Teller) -> None:
    """The life of an instance, from launch to delete."""
    path = f"/v1/instances/{NAME}"

    instance = api.call("POST", "/v1/instances", {"name": NAME, "labels": {"purpose": "demo"}})
    tell.step("launch", f"{instance['name']} from image {instance['image']}: {instance['state']}")

    seen: set[str] = set()
    for change in api.stream(f"{path}/wait?until=ADDRESS&timeout=60s"):
        steps = change["instance"]["readiness"]["steps"]
        for step in (step for step in steps if step["rung"] not in seen):
            tell.step("" if seen else "ready", f"{step['rung'].lower():<8} {float(step['elapsed'].rstrip('s')):6.2f} s")
            seen.add(step["rung"])

    system = api.call("GET", f"{path}/guest/get-osinfo")
    interfaces = api.call("GET", f"{path}/guest/network-get-interfaces")["interfaces"]
    host = api.call("GET", f"{path}/guest/get-host-name")
    addresses = (f"{a['ipAddress']}/{a['prefix']} on {i['name']}" for i in interfaces for a in i["ipAddresses"])
    tell.step(
        "guest",
        f"system    {printable(system.get('prettyName', '?'))}",
        f"host name {printable(host['hostName'])}",
        f"addresses {printable(', '.join(addresses))}",
    )

    command = ["uname", "-a"]
    result = api.call("POST", f"{path}/run", {"command": command})
    if result["exitCode"] != 0:
        raise Aborted(f"{' '.join(command)} in the guest ended with code {result['exitCode']}")
    tell.step("run", f"$ {' '.join(command)}", *map(printable, result["stdout"].splitlines()))

    asked_at_s = time.monotonic()
    last = api.call("POST", f"{path}/stop", {})["lastExit"]
    if last["stopStep"] != "AGENT":
        raise Aborted(f"the stop worked by {last['stopStep']}, not by the guest agent: {last['detail']}")
    tell.step("stop", f"by the guest agent's shutdown, in {time.monotonic() - asked_at_s:.2f} s")

    api.call("DELETE", path)
    tell.step("delete", "done")


async def _demo(console: Console) -> None:
    tell = Teller(console)
    before = traces.interfaces()
    # Not $TMPDIR, which may be too long for the path of a socket.
    herd = Herd(Path(tempfile.mkdtemp(prefix="vmherd-demo-", dir="/tmp")))
    try:
        finished = await race(_interrupted(), _live_through(herd, tell))
        left = [*traces.all_of(herd), *sorted(traces.interfaces() - before)]
    except VmherdError:
        for log in sorted(herd.logs.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()
            print(f"--- {log.name}", *lines[-TAIL_LINES:], sep="\n", file=sys.stderr)
        raise
    finally:
        for pid in traces.processes(herd.path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(herd.path)
    if left:
        raise Aborted(f"left behind: {', '.join(left)}")
    tell.step("left", "no process, no socket, no interface, no file")
    if not finished:
        raise typer.Exit(INTERRUPTED)
    tell.step("", f"all in {time.monotonic() - tell.started_at_s:.1f} s")


async def _interrupted() -> bool:
    await until_signalled()
    return False


async def _live_through(herd: Herd, tell: Teller) -> bool:
    async with herd_up(herd, herd.path / "state", Flags(http="127.0.0.1:0")) as (processes, _):
        tell.step("up", f"three processes in {herd.path}, the gateway on http://{processes.http}")
        api = Api(processes.http, herd.token.read_text().strip())
        try:
            await race(asyncio.to_thread(story, api, tell), processes.until_one_ends())
        finally:
            with contextlib.suppress(Aborted):  # there is none where the story came to its end
                await asyncio.to_thread(api.call, "DELETE", f"/v1/instances/{NAME}?force=true")
    return True
