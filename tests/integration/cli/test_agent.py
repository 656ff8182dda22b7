"""`vmherd agent` with the real agent on a host socket, and with what people take for one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from typer.testing import Result

from tests.contract.guest_agent.conftest import QemuGa
from tests.framework.fake_agent import FakeAgent
from tests.integration.cli.conftest import Cli
from vmherd.cli.agent_errors import explained
from vmherd.cli.exit_codes import exit_code
from vmherd.cli.raw_calls import print_result
from vmherd.guest_agent import AgentNotConnected, UnixAddress

TIMEOUT_S = 20.0
FILES_AND_PROGRAMS = {
    *("guest-sync-delimited", "guest-ping", "guest-info", "guest-exec", "guest-exec-status"),
    *(f"guest-file-{what}" for what in ("open", "close", "read", "write", "seek", "flush")),
}

Agent = Callable[..., Result]


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


@pytest.fixture
def path(portal: BlockingPortal, rundir: Path) -> Iterator[Path]:
    peer = QemuGa(rundir / "agent.sock", blocked={"guest-get-timezone"})
    portal.call(peer.start)
    yield peer.path
    portal.call(peer.stop)


@pytest.fixture
def filer(cli: Cli, portal: BlockingPortal, rundir: Path) -> Iterator[Agent]:
    """`vmherd agent` with an agent that may read and write this host's files."""
    peer = QemuGa(rundir / "filer.sock", harmless=FILES_AND_PROGRAMS)
    portal.call(peer.start)
    yield lambda *words, **options: cli("agent", "--socket", str(peer.path), *words, **options)
    portal.call(peer.stop)


@pytest.fixture
def agent(cli: Cli, path: Path) -> Agent:
    return lambda *words: cli("agent", "--socket", str(path), *words)


def test_a_result_is_json_with_every_digit(agent: Agent) -> None:
    result = agent("sync", '{"id": 9223372036854775807}')
    assert (result.exit_code, result.stdout, result.stderr) == (0, "9223372036854775807\n", "")
    assert json.loads(agent("guest-get-host-name").stdout) == {"host-name": socket.gethostname()}


def test_arguments_may_be_words(agent: Agent) -> None:
    pid = json.loads(agent("guest-exec", "path=cat", 'arg=["-"]', "input-data=NDI=", "capture-output=true").stdout)[
        "pid"
    ]
    while not (status := json.loads(agent("exec-status", f"pid={pid}").stdout))["exited"]:
        pass
    assert (status["exitcode"], status["out-data"]) == (0, "NDI=")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["7"], "'7' is neither"),
        (["=7"], "'=7' is neither"),
        (['{"id": 1}', "a=b"], "is neither"),
        (['{"id": 1'], "not JSON"),
        (["[1]"], "wants an object"),
        (['{"id": NaN}'], "not JSON"),
        (['{"id": "\\ud800"}'], "not JSON"),
        (['{"id": ' + "[" * 100_000], "not JSON"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_sent(cli: Cli, words: list[str], text: str) -> None:
    result = cli("agent", "--socket", "/no/such.sock", "sync", *words)
    assert result.exit_code == 2
    assert text in result.stderr


def test_results_are_pretty_for_people_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_result({"a": ["\x7f\x1bä"]}, as_json=False)
    print_result({"a": 1}, as_json=True)
    assert capsys.readouterr().out == '{\n  "a": [\n    "\\u007f\\u001b\\u00e4"\n  ]\n}\n{"a": 1}\n'


def test_without_a_command_it_lists_what_the_agent_has(agent: Agent) -> None:
    lines = agent().stdout.splitlines()
    assert re.fullmatch(r"guest agent \d+\.[\d.]+, \d+ commands", lines[0])
    rows = {line.split()[0]: line.strip().split(maxsplit=2)[1:] for line in lines[2:]}
    assert rows["guest-ping"] == ["yes", "always"]
    assert rows["guest-get-timezone"][0] == "no"
    assert rows["guest-shutdown"][1].startswith("to failure alone")
    info = json.loads(agent("--json").stdout)
    assert {"name": "guest-ping", "enabled": True, "success-response": True} in info["supported_commands"]


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [
        ("make-coffee", 1, "guest-make-coffee has not been found"),
        ("get-timezone", 7, "has been disabled"),
        ("shutdown", 7, "has been disabled"),
        ("exec-status pid=999999999", 1, "pid"),
    ],
)
def test_the_agents_errors_have_exit_codes(agent: Agent, command: str, code: int, text: str) -> None:
    result = agent(*command.split())
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("vmherd: ")
    assert text in result.stderr
    assert result.stderr.count("\n") == 1


def test_errors_as_json_are_statuses(agent: Agent) -> None:
    for words in (("--json", "get-timezone"), ("get-timezone", "--json")):
        assert json.loads(agent(*words).stderr)["details"][0]["reason"] == "AGENT_COMMAND_DISABLED"


def test_a_command_that_is_not_answered_says_so(
    cli: Cli, portal: BlockingPortal, rundir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmherd.cli.agent.SILENCE_S", 0.2)
    fake = FakeAgent(rundir / "agent.sock")
    portal.call(fake.start)
    result = cli("agent", "--socket", str(fake.path), "shutdown", "mode=reboot")
    portal.call(fake.stop)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "only if it fails" in result.stderr
    assert [request.arguments for request in fake.requests if request.command == "guest-shutdown"] == [
        {"mode": "reboot"}
    ]


@pytest.mark.parametrize(
    ("listen", "words"), [("tcp:127.0.0.1:4444", "no port, which has no owner"), ("x:y", "neither unix: nor tcp:")]
)
def test_an_agent_is_shared_on_unix_sockets_alone(cli: Cli, path: Path, listen: str, words: str) -> None:
    result = cli("agent", "--socket", str(path), "--listen", listen)
    assert result.exit_code == 2
    assert words in result.stderr


def test_the_socket_has_to_be_named(cli: Cli, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cli("agent", "ping")
    assert result.exit_code == 2
    assert "--socket" in result.stderr
    assert cli("agent", "ping", "--socket", str(path)).stdout == "{}\n"
    monkeypatch.setenv("VMHERD_AGENT_SOCKET", str(path))
    assert cli("agent", "ping").stdout == "{}\n"
    monkeypatch.setenv("VMHERD_AGENT_SOCKET", "/no/such.sock")
    assert cli("agent", "--socket", str(path), "ping").stdout == "{}\n"


def test_an_agent_on_tcp(cli: Cli, path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    forward = [f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr", f"UNIX-CONNECT:{path}"]
    with subprocess.Popen(["socat", "-d", "-d", *forward], stderr=subprocess.PIPE, text=True) as socat:
        assert socat.stderr
        while "listening on" not in socat.stderr.readline():
            assert socat.poll() is None
        assert cli("agent", "--socket", f"tcp:127.0.0.1:{port}", "sync", "id=3").stdout == "3\n"
        socat.communicate(timeout=TIMEOUT_S)
    refused = cli("agent", "--socket", f"tcp:127.0.0.1:{port}", "ping")
    assert refused.exit_code == 5
    assert "Connect call failed" in refused.stderr


@pytest.mark.parametrize("address", ["tcp:nowhere", "tcp:127.0.0.1:0", "vsock:3:1", ""])
def test_an_address_that_is_none(cli: Cli, address: str) -> None:
    result = cli("agent", "--socket", address, "ping")
    assert result.exit_code == 2
    assert "--socket" in result.stderr


def test_the_shell_completes_what_this_agent_has(path: Path) -> None:
    def completed(*words: str) -> list[str]:
        environment = {"_VMHERD_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words)}
        return subprocess.run(
            [sys.executable, "-m", "vmherd"],
            env=os.environ | environment | {"COMP_CWORD": str(len(words) - 1)},
            stdout=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        ).stdout.split()

    assert completed("vmherd", "agent", "--socket", str(path), "guest-get-hos") == ["guest-get-host-name"]
    assert completed("vmherd", "agent", "--socket", str(path), "network-get-r") == []  # newer than this agent
    assert completed("vmherd", "agent", "--socket", "/no/such.sock", "network-get-r") == ["network-get-route"]


def refused(cli: Cli, path: Path, *words: str) -> tuple[int, str]:
    result = cli("agent", "--socket", str(path), "ping", "--timeout", "2", *words)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.exit_code, result.stderr


def test_no_socket(cli: Cli, rundir: Path) -> None:
    code, text = refused(cli, rundir / "agent.sock")
    assert code == 4
    assert "there is no socket at" in text
    assert "org.qemu.guest_agent.0" in text


def test_a_file_that_is_no_socket(cli: Cli, rundir: Path) -> None:
    (rundir / "agent.sock").touch()
    code, text = refused(cli, rundir / "agent.sock")
    assert code == 2
    assert "is no socket" in text


def test_a_vm_that_is_off(cli: Cli, rundir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as ended:
        ended.bind(str(rundir / "agent.sock"))
    code, text = refused(cli, rundir / "agent.sock")
    assert code == 5
    assert "the VM is off" in text


def test_a_socket_of_somebody_else(path: Path) -> None:
    path.chmod(0o600)
    denied = AgentNotConnected("no", command="guest-ping", elapsed_s=0.0)
    denied.__cause__ = PermissionError()  # which root never gets
    error = explained(denied, UnixAddress(str(path)))
    assert exit_code(error) == 7
    assert "may not connect" in error.message
    assert f"belongs to {path.owner()}:{path.group()} and has mode 0600" in error.message


def test_a_socket_that_another_client_holds(cli: Cli, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(path))
        code, text = refused(cli, path)
    assert code == 6
    assert "another client holds the socket" in text


def test_qemus_monitor(cli: Cli, rundir: Path) -> None:
    path = rundir / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen()
        monitor = [
            "-chardev",
            f"socket,id=monitor,fd={listener.fileno()},server=on,wait=off",
            "-mon",
            "monitor,mode=control",
        ]
        with subprocess.Popen(
            ["qemu-system-x86_64", "-M", "none", "-display", "none", "-serial", "none", *monitor],
            pass_fds=[listener.fileno()],
        ) as qemu:
            try:
                first.settimeout(TIMEOUT_S)
                first.connect(str(path))
                assert first.recv(100)  # now it is there
                first.close()
                code, text = refused(cli, path)
            finally:
                qemu.terminate()
    assert code == 2
    assert "QMP" in text


def test_a_console(cli: Cli, rundir: Path) -> None:
    with says(rundir / "console.sock", b"\r\nweb login: "):
        code, text = refused(cli, rundir / "console.sock")
    assert code == 2
    assert "console" in text
    assert "web login:" in text


@contextmanager
def says(path: Path, greeting: bytes) -> Iterator[None]:
    """Something that greets everybody and answers nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        clients = []

        def greet() -> None:
            for _ in range(2):  # the call and the look at what is there
                clients.append(listener.accept()[0])
                clients[-1].sendall(greeting)

        thread = threading.Thread(target=greet)
        thread.start()
        yield
        thread.join(TIMEOUT_S)
        for client in clients:
            client.close()


@contextmanager
def shared(agent: Path, path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A proxy as users start it, once it serves."""
    with subprocess.Popen(
        [sys.executable, "-m", "vmherd", "agent", "--socket", str(agent), "--listen", str(path), *options],
        stderr=subprocess.PIPE,
        text=True,
    ) as proxy:
        try:
            assert proxy.stderr
            assert f"may connect to {path}" in proxy.stderr.readline()
            yield proxy
        finally:
            proxy.terminate()
            proxy.communicate(timeout=TIMEOUT_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_several_share_an_agent_until_a_signal(cli: Cli, path: Path, rundir: Path, number: signal.Signals) -> None:
    before = set(rundir.iterdir())
    common = rundir / "shared.sock"
    with shared(path, common) as proxy, socket.socket(socket.AF_UNIX) as other:
        other.settimeout(TIMEOUT_S)
        other.connect(str(common))
        other.sendall(b'{"execute": "guest-sync", "arguments": {"id": 1}}{"execute": "gue')
        assert other.recv(100) == b'{"return": 1}\n'
        assert cli("agent", "--socket", str(common), "sync", "id=2").stdout == "2\n"
        proxy.send_signal(number)
        assert proxy.wait(TIMEOUT_S) == 0
        assert other.recv(100) == b""
    assert set(rundir.iterdir()) == before


def test_an_agent_may_be_shared_before_its_vm_is_started(cli: Cli, portal: BlockingPortal, rundir: Path) -> None:
    with shared(rundir / "agent.sock", rundir / "shared.sock"), socket.socket(socket.AF_UNIX) as early:
        early.settimeout(TIMEOUT_S)
        early.connect(str(rundir / "shared.sock"))
        early.sendall(b'{"execute": "guest-ping", "id": 1}')
        assert "there is no socket at" in json.loads(early.recv(1000))["error"]["desc"]
        peer = QemuGa(rundir / "agent.sock")
        portal.call(peer.start)
        assert cli("agent", "--socket", str(rundir / "shared.sock"), "ping").stdout == "{}\n"
        portal.call(peer.stop)


def test_one_client_too_many_is_told(path: Path, rundir: Path) -> None:
    common = rundir / "shared.sock"
    with (
        shared(path, common, "--max-clients", "1"),
        socket.socket(socket.AF_UNIX) as first,
        socket.socket(socket.AF_UNIX) as second,
    ):
        for client in (first, second):
            client.settimeout(TIMEOUT_S)
            client.connect(str(common))
        assert b"share this agent already" in second.recv(1000)


def test_a_socket_in_use_is_not_taken(cli: Cli, path: Path, rundir: Path) -> None:
    with shared(path, rundir / "shared.sock"):
        result = cli("agent", "--socket", str(path), "--listen", str(rundir / "shared.sock"))
    assert result.exit_code == 4
    assert "another process serves it" in result.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--listen", "agent.sock"], "the agent's own socket"),
        (["--listen", "other.sock", "ping"], "takes no command"),
        (["--listen", "missing/shared.sock"], "No such file or directory"),
        (["--listen", "x" * 120], "too long"),
    ],
)
def test_what_cannot_be_shared(
    cli: Cli, rundir: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str
) -> None:
    monkeypatch.chdir(rundir)
    result = cli("agent", "--socket", "agent.sock", *words)
    assert result.exit_code in (2, 4)
    assert text in result.stderr
    assert list(rundir.iterdir()) == []


def test_exec_is_as_if_the_command_ran_here(filer: Agent) -> None:
    result = filer("exec", "-n", "--env", "A=b c", "--", "/bin/sh", "-c", "echo $A; echo no >&2; exit 3")
    assert (result.exit_code, result.stdout, result.stderr) == (3, "b c\n", "no\n")


def test_exec_shows_output_while_the_command_runs_and_passes_input(filer: Agent, rundir: Path) -> None:
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vmherd",
            "agent",
            "--socket",
            rundir / "filer.sock",
            "exec",
            "--",
            "sed",
            "-u",
            "s/a/b/",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdin
        assert running.stdout
        for line in ("a1", "a2"):
            print(line, file=running.stdin, flush=True)
            assert running.stdout.readline() == f"b{line[1:]}\n"
        running.stdin.close()
        assert running.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--", "sh", "-c", "kill -9 $$"], 137),
        (["/no/such/program"], 127),
        (["--timeout", "2", "--", "sleep", "60"], 6),
    ],
)
def test_exec_ends_as_the_command_did(filer: Agent, words: list[str], code: int) -> None:
    assert filer("exec", "-n", *words).exit_code == code


def test_exec_as_json_is_what_the_controller_would_stream(filer: Agent) -> None:
    result = filer("exec", "-n", "--json", "--", "sh", "-c", r"printf 'a\377'; exit 2")
    assert result.exit_code == 2
    first, *outputs, last = map(json.loads, result.stdout.splitlines())
    assert first["process"]["state"] == "RUNNING"
    assert "".join(piece["output"]["text"] for piece in outputs) == "a\ufffd"
    assert (last["process"]["state"], last["process"]["exitCode"]) == ("EXITED", 2)


def test_files_are_copied_both_ways(filer: Agent, rundir: Path) -> None:
    data = os.urandom(600_000)
    (rundir / "here").write_bytes(data)
    assert filer("cp", str(rundir / "here"), f":{rundir}/there").exit_code == 0
    assert (rundir / "there").read_bytes() == data
    assert filer("cp", f":{rundir}/there", str(rundir / "back")).exit_code == 0
    assert (rundir / "back").read_bytes() == data
    assert filer("cp", f":{rundir}/there", "-").stdout_bytes == data
    assert filer("cp", "-", f":{rundir}/piped", input=b"from a pipe").exit_code == 0
    assert (rundir / "piped").read_bytes() == b"from a pipe"


def test_folders_are_copied_both_ways(filer: Agent, rundir: Path) -> None:
    (rundir / "here" / "in").mkdir(parents=True)
    (rundir / "here" / "in" / "file").write_text("x")
    assert filer("cp", "-r", str(rundir / "here"), f":{rundir}/there").exit_code == 0
    assert filer("cp", "-r", f":{rundir}/there", str(rundir / "back")).exit_code == 0
    assert (rundir / "back" / "in" / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("source", "target", "code", "text"),
    [
        (":/no/such/file", "copy", 3, "/no/such/file: No such file"),
        ("/no/such/file", ":/tmp/copy", 3, "/no/such/file"),
        ("one", "two", 2, "in the guest, as :/path"),
        (":/one", ":/two", 2, "in the guest, as :/path"),
        ("web:/one", "two", 2, "in the guest, as :/path"),
        (":one", "two", 2, "absolute"),
    ],
)
def test_what_cannot_be_copied(filer: Agent, source: str, target: str, code: int, text: str) -> None:
    result = filer("cp", source, target)
    assert result.exit_code == code
    assert text in result.stderr
