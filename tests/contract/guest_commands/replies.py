"""What agents answer that this host does not have: of other versions, other systems and other hardware.

The replies of 7.2 are those of Debian's 7.2.22. The others were put together from QEMU's sources: members from
qga/qapi-schema.json, values as qga/commands-*.c makes them, errors from qapi/qmp-dispatch.c and qga/main.c of 10.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmherd.guest_agent import AgentError, AgentFrozen, CommandDisabled, CommandFailed, CommandNotFound

_COMMANDS_7_2 = """
    sync-delimited sync ping get-time set-time info shutdown file-open file-close file-read file-write file-seek
    file-flush fsfreeze-status fsfreeze-freeze fsfreeze-freeze-list fsfreeze-thaw fstrim suspend-disk suspend-ram
    suspend-hybrid network-get-interfaces get-vcpus set-vcpus get-disks get-fsinfo set-user-password
    get-memory-blocks set-memory-blocks get-memory-block-info exec-status exec get-host-name get-users get-timezone
    get-osinfo get-devices ssh-get-authorized-keys ssh-add-authorized-keys ssh-remove-authorized-keys get-diskstats
    get-cpustats
"""
# A newer agent does not even have what its system cannot carry out, as get-devices on Linux.
_COMMANDS_10_2 = _COMMANDS_7_2.replace("get-devices", "") + "get-load network-get-route"

_SILENT = {"shutdown", "suspend-disk", "suspend-ram", "suspend-hybrid"}
_WHILE_FROZEN = {"ping", "info", "sync", "sync-delimited", "fsfreeze-status", "fsfreeze-thaw"}


@dataclass(frozen=True)
class Refusal:
    """A command that fails: what the agent says of it, of itself and of its file systems, and what that is to us."""

    version: str
    command: str
    error_class: str
    desc: str
    kind: type[AgentError]
    disabled: tuple[str, ...] = ()
    frozen: bool = False

    def __str__(self) -> str:
        return f"{self.version}-{self.command}-{self.kind.__name__}"

    def info(self) -> object:
        """The answer of its guest-info."""
        return {
            "version": self.version,
            "supported_commands": [
                {
                    "name": f"guest-{name}",
                    "enabled": name in _WHILE_FROZEN if self.frozen else f"guest-{name}" not in self.disabled,
                    "success-response": name not in _SILENT,
                }
                for name in (_COMMANDS_7_2 if self.version.startswith("7") else _COMMANDS_10_2).split()
            ],
        }


REFUSALS = [
    # 7.2 has the commands of all systems, and says of those of others that they are disabled.
    Refusal(
        "7.2.22",
        "guest-get-devices",
        "CommandNotFound",
        "Command guest-get-devices has been disabled",
        CommandDisabled,
        disabled=("guest-get-devices",),
    ),
    Refusal(
        "7.2.22",
        "guest-network-get-route",
        "CommandNotFound",
        "The command guest-network-get-route has not been found",
        CommandNotFound,
    ),
    Refusal(
        "7.2.22",
        "guest-exec",
        "CommandNotFound",
        "Command guest-exec has been disabled",
        CommandDisabled,
        disabled=("guest-exec",),
    ),
    Refusal(
        "7.2.22",
        "guest-exec",
        "CommandNotFound",
        "Command guest-exec has been disabled: the agent is in frozen state",
        AgentFrozen,
        frozen=True,
    ),
    Refusal("7.2.22", "guest-file-close", "GenericError", "handle '1007' has not been found", CommandFailed),
    Refusal(
        "7.2.22",
        "guest-exec",
        "GenericError",
        "Invalid parameter type for 'capture-output', expected: boolean",
        CommandFailed,
    ),
    Refusal(
        "7.2.22",
        "guest-exec",
        "GenericError",
        "Guest agent command failed, error was 'Failed to execute child process “/nonexistent” (No such file or"
        " directory)'",
        CommandFailed,
    ),
    Refusal(
        "10.2.0",
        "guest-get-devices",
        "CommandNotFound",
        "The command guest-get-devices has not been found",
        CommandNotFound,
    ),
    Refusal(
        "10.2.0",
        "guest-exec",
        "CommandNotFound",
        "Command guest-exec has been disabled: the command is not allowed",
        CommandDisabled,
        disabled=("guest-exec",),
    ),
    Refusal(
        "10.2.0",
        "guest-exec",
        "CommandNotFound",
        "Command guest-exec has been disabled: the command is not allowed",
        AgentFrozen,
        frozen=True,
    ),
    Refusal("10.2.0", "guest-file-close", "GenericError", "handle '1007' has not been found", CommandFailed),
    Refusal(
        "10.2.0",
        "guest-exec",
        "GenericError",
        "Failed to execute child process “/nonexistent” (No such file or directory)",
        CommandFailed,
    ),
]

_LOAD = {"load1m": 0.08, "load5m": 1, "load15m": 0}
_ROUTE_4 = {
    "iface": "eth0",
    "destination": "0.0.0.0",
    "gateway": "10.0.2.2",
    "mask": "0.0.0.0",
    "metric": 100,
    "flags": 3,
    "refcnt": 0,
    "use": 0,
    "mtu": 0,
    "window": 0,
    "irtt": 0,
    "version": 4,
}
_ROUTE_6 = {
    "iface": "lo",
    "destination": "::1",
    "source": "::",
    "nexthop": "::",
    "desprefixlen": "128",
    "srcprefixlen": "0",
    "metric": -1,
    # The kernel's 32 bits pass through a signed integer on their way.
    "flags": 0xFFFFFFFF80200001,
    "refcnt": 2,
    "use": 0,
    "version": 6,
}
_PCI = {"domain": 0, "bus": 0, "slot": 4, "function": 0}
_NO_PCI = {"domain": -1, "bus": -1, "slot": -1, "function": -1}
_CCW = {"cssid": 254, "ssid": 0, "subchno": 1, "devno": 65535}
_SMART = {
    "critical-warning": 0,
    "temperature": 323,
    "available-spare": 100,
    "available-spare-threshold": 10,
    "percentage-used": 255,
    "data-units-read-lo": 2**64 - 1,
    "data-units-read-hi": 1,
    "data-units-written-lo": 2,
    "data-units-written-hi": 3,
    "host-read-commands-lo": 4,
    "host-read-commands-hi": 5,
    "host-write-commands-lo": 6,
    "host-write-commands-hi": 7,
    "controller-busy-time-lo": 8,
    "controller-busy-time-hi": 9,
    "power-cycles-lo": 10,
    "power-cycles-hi": 11,
    "power-on-hours-lo": 12,
    "power-on-hours-hi": 13,
    "unsafe-shutdowns-lo": 14,
    "unsafe-shutdowns-hi": 15,
    "media-errors-lo": 16,
    "media-errors-hi": 17,
    "number-of-error-log-entries-lo": 18,
    "number-of-error-log-entries-hi": 0,
}
_TRIMMED = [{"path": "/", "trimmed": 2**40, "minimum": 0}, {"path": "/boot/efi", "error": "trim not supported"}]
_KEYS = {"keys": ["ssh-ed25519 AAAA me@host", "ssh-rsa BBBB"]}

REPLIES: list[tuple[str, object, dict[str, object]]] = [
    ("GetLoad", _LOAD, _LOAD),
    ("NetworkGetRoute", [_ROUTE_4, _ROUTE_6], {"routes": [_ROUTE_4, _ROUTE_6]}),
    (
        "GetFsinfo",
        [
            {
                "name": "vda1",
                "mountpoint": "/",
                "type": "ext4",
                "used-bytes": 2**40,
                "total-bytes": 2**63,
                "total-bytes-privileged": 2**64 - 1,
                "disk": [
                    {
                        "serial": "x",
                        "bus-type": "virtio",
                        "bus": 1,
                        "unit": 2,
                        "target": 3,
                        "pci-controller": _PCI,
                        "dev": "/dev/vda1",
                    }
                ],
            },
            # A network block device has an address that says nothing; a new kind of bus is no reason to fail.
            {
                "name": "nbd0",
                "mountpoint": "/mnt",
                "type": "xfs",
                "disk": [{"bus-type": "warp", "bus": 0, "unit": 0, "target": 0, "pci-controller": _NO_PCI}],
            },
        ],
        {
            "filesystems": [
                {
                    "name": "vda1",
                    "mountpoint": "/",
                    "type": "ext4",
                    "used_bytes": 2**40,
                    "total_bytes": 2**63,
                    "total_bytes_privileged": 2**64 - 1,
                    "disk": [
                        {
                            "serial": "x",
                            "bus_type": "VIRTIO",
                            "bus": 1,
                            "unit": 2,
                            "target": 3,
                            "pci_controller": _PCI,
                            "dev": "/dev/vda1",
                        }
                    ],
                },
                {"name": "nbd0", "mountpoint": "/mnt", "type": "xfs", "disk": [{"pci_controller": _NO_PCI}]},
            ]
        },
    ),
    (
        "GetDisks",
        [
            {
                "name": "/dev/nvme0n1",
                "partition": False,
                "dependencies": [],
                "address": {"bus-type": "nvme", "bus": 0, "unit": 0, "target": 0, "pci-controller": _PCI},
                "smart": {"type": "nvme", **_SMART},
            },
            {"name": "/dev/dm-0", "partition": False, "dependencies": ["/dev/nvme0n1"], "alias": "vg-root"},
            {
                "name": "/dev/dasda1",
                "partition": True,
                "address": {
                    "bus-type": "virtio",
                    "bus": 0,
                    "unit": 0,
                    "target": 0,
                    "pci-controller": _NO_PCI,
                    "ccw-address": _CCW,
                },
            },
        ],
        {
            "disks": [
                {
                    "name": "/dev/nvme0n1",
                    "address": {"bus_type": "NVME", "pci_controller": _PCI},
                    "smart": {"type": "NVME", **{name.replace("-", "_"): value for name, value in _SMART.items()}},
                },
                {"name": "/dev/dm-0", "dependencies": ["/dev/nvme0n1"], "alias": "vg-root"},
                {
                    "name": "/dev/dasda1",
                    "partition": True,
                    "address": {"bus_type": "VIRTIO", "pci_controller": _NO_PCI, "ccw_address": _CCW},
                },
            ]
        },
    ),
    # Windows.
    (
        "GetDevices",
        [
            {
                "driver-name": "Red Hat VirtIO Ethernet Adapter",
                "driver-date": 1663545600000000000,
                "driver-version": "100.92.104.22900",
                "id": {"type": "pci", "vendor-id": 6900, "device-id": 65535},
            },
            {"driver-name": "Plug and Play Monitor"},
        ],
        {
            "devices": [
                {
                    "driver_name": "Red Hat VirtIO Ethernet Adapter",
                    "driver_date": 1663545600000000000,
                    "driver_version": "100.92.104.22900",
                    "id": {"type": "PCI", "vendor_id": 6900, "device_id": 65535},
                },
                {"driver_name": "Plug and Play Monitor"},
            ]
        },
    ),
    (
        "GetUsers",
        [{"user": "Administrator", "domain": "WIN-1", "login-time": 1700000000.123456}, {"user": "x", "login-time": 1}],
        {
            "users": [
                {"user": "Administrator", "domain": "WIN-1", "login_time": 1700000000.123456},
                {"user": "x", "login_time": 1.0},
            ]
        },
    ),
    (
        "GetOsinfo",
        {
            "name": "Microsoft Windows",
            "kernel-release": "20348",
            "version": "Microsoft Windows Server 2022",
            "variant": "server",
            "pretty-name": "Windows Server 2022 Standard",
            "version-id": "2022",
            "variant-id": "server",
            "kernel-version": "10.0",
            "machine": "x86_64",
            "id": "mswindows",
        },
        {
            "name": "Microsoft Windows",
            "kernel_release": "20348",
            "version": "Microsoft Windows Server 2022",
            "variant": "server",
            "pretty_name": "Windows Server 2022 Standard",
            "version_id": "2022",
            "variant_id": "server",
            "kernel_version": "10.0",
            "machine": "x86_64",
            "id": "mswindows",
        },
    ),
    ("ExecStatus", {"exited": True, "signal": -1073741819}, {"exited": True, "signal": -1073741819}),
    (
        "GetTimezone",
        {"zone": "Pacific Standard Time", "offset": -28800},
        {"zone": "Pacific Standard Time", "offset": -28800},
    ),
    # What this host's own agent is not allowed to do in tests.
    ("Fstrim", {"paths": _TRIMMED}, {"paths": _TRIMMED}),
    (
        "SetMemoryBlocks",
        [
            {"phys-index": 0, "response": "operation-not-supported", "error-code": 13},
            {"phys-index": 32, "response": "operation-failed", "error-code": 16},
            {"phys-index": 33, "response": "success"},
        ],
        {
            "responses": [
                {"phys_index": 0, "response": "OPERATION_NOT_SUPPORTED", "error_code": 13},
                {"phys_index": 32, "response": "OPERATION_FAILED", "error_code": 16},
                {"phys_index": 33, "response": "SUCCESS"},
            ]
        },
    ),
    ("SetVcpus", 2, {"processed": 2}),
    ("FsfreezeFreeze", 3, {"frozen": 3}),
    ("FsfreezeFreezeList", 1, {"frozen": 1}),
    ("FsfreezeThaw", 3, {"thawed": 3}),
    ("FsfreezeStatus", "frozen", {"status": "FROZEN"}),
    ("SshGetAuthorizedKeys", _KEYS, _KEYS),
    ("SshAddAuthorizedKeys", {}, {}),
    ("SshRemoveAuthorizedKeys", {}, {}),
    ("SetUserPassword", {}, {}),
    ("SetTime", {}, {}),
    # Agents older than 1.7 do not say which commands are silent.
    (
        "Info",
        {"version": "1.6.0", "supported_commands": [{"enabled": True, "name": "guest-ping"}]},
        {"version": "1.6.0", "supported_commands": [{"name": "guest-ping", "enabled": True}]},
    ),
]
"""An RPC, a result of its command, and its response as protobuf's JSON."""
