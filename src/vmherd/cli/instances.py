"""`vmherd start`, `stop`, `info`, … : the commands for instances that exist."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Annotated, Literal, TypeVar

import typer
from google.protobuf.message import Message

from vmherd.api.v1.controller_pb2 import (
    DeleteRequest,
    InfoRequest,
    ListResponse,
    PauseRequest,
    RestartRequest,
    ResumeRequest,
    StartRequest,
    StopRequest,
    UpdateRequest,
    WaitRequest,
    WatchRequest,
    WatchResponse,
)
from vmherd.api.v1.instance_pb2 import Exit, Instance
from vmherd.cli import show
from vmherd.cli.exit_codes import exit_code
from vmherd.cli.report import tell, to_json
from vmherd.cli.session import (
    ANSWER_TIMEOUT_S,
    DAY_S,
    MARGIN_S,
    Name,
    Names,
    Session,
    Timeout,
    complete_name,
    connected,
)
from vmherd.cli.values import duration
from vmherd.client import Client
from vmherd.model.errors import Aborted, DeadlineExceeded, FailedPrecondition, VmherdError
from vmherd.model.lifecycle import ACTIVE

CHANGE_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 600.0
"""A stop keeps its own times; this one only ends a controller that does not."""
KILL_TIMEOUT_S = 30.0
WAIT_TIMEOUT_S = 120.0
PARALLEL_MAX = 16

INT64_MAX = 2**63 - 1

app = typer.Typer()

Answer = TypeVar("Answer", bound=Message)

RequestId = Annotated[
    str, typer.Option("--request-id", metavar="ID", help="The same id again gets the same answer and does nothing.")
]
Force = Annotated[bool, typer.Option("--force", help="Kill QEMU at once; the guest loses what it has not written.")]
Grace = Annotated[
    float | None,
    typer.Option(
        "--grace", metavar="S", min=0, max=DAY_S, help="Seconds for the agent's shutdown, and for the power button."
    ),
]


@app.command(rich_help_panel="Instances")
@connected
def start(session: Session, names: Names, request_id: RequestId = "") -> None:
    """Starts instances that are stopped or failed."""

    def call(name: str) -> Instance:
        return session.client.instances.Start(StartRequest(name=name, request_id=request_id), timeout=CHANGE_TIMEOUT_S)

    _for_each(session, names, call, show_started, request_id)


@app.command(rich_help_panel="Instances")
@connected
def stop(
    session: Session,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="The instances.", autocompletion=complete_name)
    ] = None,
    *,
    all_: Annotated[bool, typer.Option("--all", help="Stop every instance that runs.")] = False,
    force: Force = False,
    grace: Grace = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="S",
            min=0,
            max=DAY_S,
            help="Kill what has not stopped after so many seconds, and exit with code 6. Default: --grace decides.",
        ),
    ] = None,
    request_id: RequestId = "",
) -> None:
    """Stops instances: asks the guest agent, presses the power button, tells QEMU to quit, kills it."""
    if all_ == bool(names):
        raise typer.BadParameter("name the instances to stop, or give --all")
    deadline_s = None if timeout is None else time.monotonic() + timeout
    # Within a budget the agent's shutdown may take all of it.
    grace = timeout if grace is None else grace

    def call(name: str) -> Instance:
        request = StopRequest(name=name, force=force, grace=duration(grace), request_id=request_id)
        try:
            return _stop_until(session.client, request, deadline_s)
        except FailedPrecondition:
            instance = session.client.instances.Info(InfoRequest(name=name), timeout=ANSWER_TIMEOUT_S)
            if not all_ or is_active(instance):
                raise
            return instance  # it went down by itself in the meantime

    def show_answer(session: Session, instance: Instance) -> None:
        if deadline_s and not force and instance.last_exit.stop_step in (Exit.QUIT, Exit.KILL):
            raise DeadlineExceeded(f"{instance.name} did not stop within {timeout:g} s and was killed", reason="KILLED")
        _show_summary(session, instance)

    if all_:
        names = [instance.name for page in session.client.pages() for instance in page.instances if is_active(instance)]
    if names:
        _for_each(session, names, call, show_answer, request_id, at_once=len(names))


@app.command(rich_help_panel="Instances")
@connected
def restart(
    session: Session, names: Names, force: Force = False, grace: Grace = None, request_id: RequestId = ""
) -> None:
    """Stops instances as `stop` does and starts them again."""

    def call(name: str) -> Instance:
        request = RestartRequest(name=name, force=force, grace=duration(grace), request_id=request_id)
        return session.client.instances.Restart(request, timeout=STOP_TIMEOUT_S + 2 * (grace or 0))

    _for_each(session, names, call, show_started, request_id)


@app.command(rich_help_panel="Instances")
@connected
def pause(session: Session, names: Names) -> None:
    """Halts the virtual CPUs of running instances."""

    def call(name: str) -> Instance:
        return session.client.instances.Pause(PauseRequest(name=name), timeout=CHANGE_TIMEOUT_S)

    _for_each(session, names, call, _show_summary)


@app.command(rich_help_panel="Instances")
@connected
def resume(session: Session, names: Names) -> None:
    """Lets paused instances run on, and wakes those that sleep."""

    def call(name: str) -> Instance:
        return session.client.instances.Resume(ResumeRequest(name=name), timeout=CHANGE_TIMEOUT_S)

    _for_each(session, names, call, _show_summary)


@app.command(rich_help_panel="Instances")
@connected
def delete(
    session: Session,
    names: Names,
    force: Annotated[bool, typer.Option("--force", help="Kill those first that run.")] = False,
    request_id: RequestId = "",
) -> None:
    """Removes instances with their disks."""

    def call(name: str) -> Message:
        request = DeleteRequest(name=name, force=force, request_id=request_id)
        return session.client.instances.Delete(request, timeout=STOP_TIMEOUT_S)

    def show_answer(session: Session, answer: Message) -> None:
        if session.as_json:
            print(to_json(answer))

    _for_each(session, names, call, show_answer, request_id)


@app.command(rich_help_panel="Instances")
@connected
def update(
    session: Session,
    names: Names,
    *,
    autostart: Annotated[
        bool | None, typer.Option("--autostart/--no-autostart", help="Start them, or leave them.")
    ] = None,
) -> None:
    """Changes whether instances start when the host has booted."""
    if autostart is None:
        raise typer.BadParameter("say what to change: --autostart or --no-autostart")

    def call(name: str) -> Instance:
        return session.client.instances.Update(UpdateRequest(name=name, autostart=autostart), timeout=CHANGE_TIMEOUT_S)

    _for_each(session, names, call, _show_summary)


@app.command(rich_help_panel="Instances")
@connected
def info(session: Session, name: Name) -> None:
    """Shows one instance."""
    instance = session.client.instances.Info(InfoRequest(name=name), timeout=ANSWER_TIMEOUT_S)
    if session.as_json:
        print(to_json(instance))
    else:
        show.open_console().print(show.instance_details(instance))


@app.command(rich_help_panel="Instances", name="list")
@connected
def list_(
    session: Session,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="KEY[=VALUE]", help="Only instances with this label; may be repeated."),
    ] = None,
) -> None:
    """Lists the instances."""
    pages = list(session.client.pages(label or []))
    instances = [instance for page in pages for instance in page.instances]
    if session.as_json:
        print(to_json(ListResponse(instances=instances, revision=pages[0].revision)))
    elif instances:
        show.open_console().print(show.instance_table(instances, datetime.now(UTC)))
    elif sys.stdout.isatty():
        print("no instances; `vmherd launch NAME` makes one", file=sys.stderr)


@app.command(rich_help_panel="Instances")
@connected
def wait(
    session: Session,
    name: Name,
    until: Annotated[
        Literal["process", "qmp", "agent", "address", "stopped"], typer.Option("--until", help="What to wait for.")
    ] = "agent",
    timeout: Timeout = WAIT_TIMEOUT_S,
) -> None:
    """Waits until an instance reaches a step of its start, or has stopped."""
    _show_summary(session, wait_for(session, name, until, timeout))


@app.command(rich_help_panel="Instances")
@connected
def watch(
    session: Session,
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="Only this instance.", autocompletion=complete_name)
    ] = "",
    from_revision: Annotated[
        int,
        typer.Option(
            "--from-revision", metavar="N", min=0, max=INT64_MAX, help="Show what happened after this revision."
        ),
    ] = 0,
) -> None:
    """Shows every change of the instances, until Ctrl-C."""
    request = WatchRequest(name=name, from_revision=from_revision)
    for change in session.client.instances.Watch(request):
        if session.as_json:
            print(to_json(change), flush=True)
        elif change.kind != WatchResponse.SYNCED:
            print(show.change_line(change, datetime.now()), flush=True)


def is_active(instance: Instance) -> bool:
    """A QEMU process of it runs, or may run."""
    return Instance.State.Name(instance.state) in ACTIVE


def _stop_until(client: Client, request: StopRequest, deadline_s: float | None) -> Instance:
    """Stops an instance as the request says, and kills it where that is not done by the deadline, a monotonic time."""
    if deadline_s is None:
        return client.instances.Stop(request, timeout=STOP_TIMEOUT_S + 2 * request.grace.ToTimedelta().total_seconds())
    try:
        return client.instances.Stop(request, timeout=max(0, deadline_s - time.monotonic()))
    except DeadlineExceeded:
        return client.instances.Stop(StopRequest(name=request.name, force=True), timeout=KILL_TIMEOUT_S)


def wait_for(session: Session, name: str, until: str, timeout_s: float) -> Instance:
    """Waits for a condition, shows how it comes true, and gives the instance as it is then."""
    condition = WaitRequest.Condition.Value(until.upper())
    request = WaitRequest(name=name, until=condition, timeout=duration(timeout_s))
    answers = session.client.instances.Wait(request, timeout=timeout_s + MARGIN_S)
    if not session.as_json:
        return show.follow(answers, show.open_console(sys.stderr))
    *_, last = answers
    return last.instance


def _show_summary(session: Session, instance: Instance) -> None:
    print(to_json(instance) if session.as_json else show.summary(instance))


def show_started(session: Session, instance: Instance) -> None:
    """A start that was accepted may have failed by the time of its answer."""
    if instance.state == Instance.FAILED:
        raise Aborted(
            f"{instance.name} did not start: {instance.last_exit.detail}; `vmherd info {instance.name}` shows more",
            reason="START_FAILED",
            metadata={"name": instance.name},
        )
    _show_summary(session, instance)


def _for_each(
    session: Session,
    names: list[str],
    call: Callable[[str], Answer],
    show_answer: Callable[[Session, Answer], None],
    request_id: str = "",
    *,
    at_once: int = PARALLEL_MAX,
) -> None:
    """Calls for all the names at once, shows the answers in their order, and exits with the first error's code."""
    if request_id and len(names) > 1:
        raise typer.BadParameter("--request-id stands for one request, so it goes with one name")
    code = 0
    pool = ThreadPoolExecutor(min(len(names), at_once))
    try:
        for answer in [pool.submit(call, name) for name in names]:
            try:
                show_answer(session, answer.result())
            except VmherdError as error:
                tell(error, as_json=session.as_json)
                code = code or exit_code(error)
    except KeyboardInterrupt:
        session.client.close()  # ends the calls, without which their threads would go on
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    if code:
        raise typer.Exit(code)
