from __future__ import annotations

from typing import Any

import pytest

from vmherd.controller.happening import Happening, happening_of


@pytest.mark.parametrize(
    ("event", "data", "happening"),
    [
        ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}, Happening.SHUTDOWN),
        ("SHUTDOWN", {"guest": True, "reason": "guest-panic"}, None),
        ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}, None),
        ("SHUTDOWN", {}, None),
        ("RESET", {"guest": True, "reason": "guest-reset"}, Happening.RESET),
        ("SUSPEND", {}, Happening.SUSPEND),
        ("SUSPEND_DISK", {}, Happening.SUSPEND_DISK),
        ("WAKEUP", {}, None),
        ("VSERPORT_CHANGE", {"id": "agent0", "open": False}, Happening.AGENT_LEFT),
        ("VSERPORT_CHANGE", {"id": "agent0", "open": True}, None),
        ("VSERPORT_CHANGE", {"id": "other", "open": False}, None),
    ],
)
def test_what_an_event_means(event: str, data: dict[str, Any], happening: Happening | None) -> None:
    assert happening_of(event, data) is happening
