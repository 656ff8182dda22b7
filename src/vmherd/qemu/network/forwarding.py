"""Whether the host forwards packets: turned on for networks that need it, and put back after the last one."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

IPV4, IPV6 = "ipv4-forwarding", "ipv6-forwarding"
"""What is turned on, and the files that remember how it was."""

SWITCHES: Mapping[str, Path] = {
    IPV4: Path("/proc/sys/net/ipv4/ip_forward"),
    IPV6: Path("/proc/sys/net/ipv6/conf/all/forwarding"),
}


def set_forwarding(directory: Path, wanted: Container[str]) -> None:
    """Turns the wanted switches on, and puts those back that were turned on before and are not wanted any more."""
    for name, switch in SWITCHES.items():
        before = directory / name
        if name in wanted:
            # Written first: who comes back after an end in between puts back what was not changed.
            if (value := switch.read_text()).strip() == "0":
                before.write_text(value)
                switch.write_text("1")
        elif before.exists():
            switch.write_text(before.read_text())
            before.unlink()
