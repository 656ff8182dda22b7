from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vmherd.api.settings.v1.settings_pb2 import ControllerSettings, GatewaySettings, QemuSettings
from vmherd.cli.settings import load_settings
from vmherd.model.errors import InvalidArgument

QEMU = {"listen": "/r/qemu.sock", "run_dir": "/r", "state_dir": "/s"}
CONTROLLER = {"listen": "/r/c.sock", "qemu": "/r/qemu.sock", "run_dir": "/r", "state_dir": "/s"}
GATEWAY = {"listen": "127.0.0.1:0", "controller": "/r/c.sock", "token_file": "/r/token"}

GOOD: list[tuple[type, dict[str, Any]]] = [
    (QemuSettings, QEMU),
    (QemuSettings, QEMU | {"accelerator": "TCG", "qemu_binary": "qemu-system-x86_64", "log_level": "debug"}),
    (QemuSettings, QEMU | {"controller_user": "vmherd", "uids": {"first": 100000, "count": 10}}),
    (QemuSettings, QEMU | {"controllerUser": "1000", "uids": None, "networks": []}),
    (
        QemuSettings,
        QEMU | {"networks": [{"name": "a", "bridge": "b", "ipv6Subnet": "fd00::/64"}, {"host_access": True}]},
    ),
    (QemuSettings, {"listen": "/r/qemu.sock", "runDir": "/r", "stateDir": "/s"}),
    (ControllerSettings, CONTROLLER),
    (ControllerSettings, CONTROLLER | {"listen_tcp": "[::1]:50051", "token_file": "/r/token"}),
    (ControllerSettings, CONTROLLER | {"stop_grace": "0.5s", "agent_timeout": "10s"}),
    (ControllerSettings, CONTROLLER | {"socket_group": "vmherd-clients"}),
    (ControllerSettings, CONTROLLER | {"socket_group": "4294967294"}),
    (GatewaySettings, GATEWAY),
    (GatewaySettings, {"listen": "localhost:65535", "controller": "/r/c.sock", "no_token": True}),
    (GatewaySettings, GATEWAY | {"allowed_hosts": ["a.example"], "max_body_bytes": "1000"}),
]


def _write(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(("kind", "document"), GOOD)
def test_good_settings_are_read(tmp_path: Path, kind: type, document: dict[str, Any]) -> None:
    settings = load_settings(_write(tmp_path / "s.json", document), kind)
    assert isinstance(settings, kind)
    assert settings.listen == document["listen"]


@pytest.mark.parametrize(
    ("kind", "document", "problem"),
    [
        (QemuSettings, [], "must be a JSON object"),
        (QemuSettings, QEMU | {"rundir": "/r"}, "unknown field 'rundir'; the fields are listen, run_dir, state_dir"),
        (QemuSettings, QEMU | {"listen": 5}, "Failed to parse listen field"),
        (QemuSettings, QEMU | {"accelerator": "XEN"}, "XEN"),
        (QemuSettings, QEMU | {"accelerator": 9}, "accelerator must be AUTO, KVM or TCG, is 9"),
        (QemuSettings, QEMU | {"qemu_binary": "./qemu"}, "qemu_binary must be a name or an absolute path"),
        (QemuSettings, {}, "listen is required; run_dir is required; state_dir is required"),
        (QemuSettings, QEMU | {"run_dir": "r"}, "run_dir must be an absolute path, is 'r'"),
        (QemuSettings, QEMU | {"log_level": "loud"}, "log_level must be one of debug, info, warning, error, is 'loud'"),
        (
            QemuSettings,
            QEMU | {"controller_user": "vm herd"},
            "controller_user must be a name or a number, is 'vm herd'",
        ),
        (QemuSettings, QEMU | {"controller_user": "-1"}, "controller_user must be a name or a number, is '-1'"),
        (QemuSettings, QEMU | {"controller_user": "\u0663"}, "controller_user must be a name or a number"),
        (QemuSettings, QEMU | {"controller_user": 1000}, "controller_user"),
        (QemuSettings, QEMU | {"uids": {"frist": 1}}, "unknown field 'uids.frist'; the fields are first, count"),
        (QemuSettings, QEMU | {"uids": [1, 2]}, "uids must be a JSON object"),
        (QemuSettings, QEMU | {"uids": {"first": -1}}, "Failed to parse uids field: Failed to parse first field"),
        (
            QemuSettings,
            QEMU | {"networks": [{"name": "a"}, {"brigde": "b"}]},
            "unknown field 'networks[1].brigde'; the fields are name, bridge, subnet, ipv6_subnet",
        ),
        (QemuSettings, QEMU | {"networks": ["a"]}, "networks[0] must be a JSON object"),
        (QemuSettings, QEMU | {"networks": [None]}, "networks[0] must be a JSON object"),
        (QemuSettings, QEMU | {"networks": {"name": "a"}}, "networks must be in []"),
        (
            ControllerSettings,
            CONTROLLER | {"socket_group": "4294967295"},
            "socket_group must be a number below 4294967295",
        ),
        (ControllerSettings, CONTROLLER | {"socket_group": "a:b"}, "socket_group must be a name or a number, is 'a:b'"),
        (ControllerSettings, CONTROLLER | {"listen_tcp": "127.0.0.1:1"}, "token_file is required with listen_tcp"),
        (ControllerSettings, CONTROLLER | {"stop_grace": "0s"}, "stop_grace must be longer than 0 s"),
        (ControllerSettings, CONTROLLER | {"stop_grace": "-1s"}, "stop_grace must be longer than 0 s"),
        (ControllerSettings, CONTROLLER | {"stop_grace": 30}, "stop_grace"),
        (GatewaySettings, GATEWAY | {"listen": "8080"}, "listen must be HOST:PORT"),
        (GatewaySettings, GATEWAY | {"listen": "::1:80"}, "listen must be HOST:PORT"),
        (GatewaySettings, GATEWAY | {"listen": "h:65536"}, "listen must have a port from 0 to 65535"),
        (GatewaySettings, GATEWAY | {"listen": "h:"}, "listen must have a port"),
        (GatewaySettings, GATEWAY | {"token_file": ""}, "token_file is required unless no_token is true"),
        (GatewaySettings, GATEWAY | {"max_body_bytes": -1}, "max_body_bytes"),
    ],
)
def test_bad_settings_are_refused_with_the_file_and_the_field(
    tmp_path: Path, kind: type, document: object, problem: str
) -> None:
    path = _write(tmp_path / "s.json", document)
    with pytest.raises(InvalidArgument) as raised:
        load_settings(path, kind)
    assert raised.value.message.startswith(f"{path}: ")
    assert problem in raised.value.message
    assert "\n" not in raised.value.message


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = _write(tmp_path / "s.json", {"listen": "x", "log_level": "loud"})
    with pytest.raises(InvalidArgument) as raised:
        load_settings(path, ControllerSettings)
    for name in ("listen", "qemu", "run_dir", "state_dir", "log_level"):
        assert f"{name} " in raised.value.message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{\n  "listen": oops\n}', "s.json:2:13: not JSON"),
        (b"", "s.json:1:1: not JSON"),
        (b'{"listen": "\xff"}', "not UTF-8 text, at byte 12"),
        (b'{"listen": "/a", "listen": "/b"}', "the field 'listen' is there twice"),
    ],
)
def test_what_is_not_json_is_refused_with_its_place(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=problem):
        load_settings(path, QemuSettings)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="No such file"):
        load_settings(tmp_path / "none.json", QemuSettings)


def test_a_directory_is_no_settings_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="Is a directory"):
        load_settings(tmp_path, QemuSettings)
