"""What an event of QEMU means for an instance."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmherd.controller.qemu_events import Meaning, meaning_of
from vmherd.model.lifecycle import Event


@pytest.mark.parametrize(
    ("name", "data", "meaning"),
    [
        ("STOP", {}, Meaning(event=Event.PAUSE)),
        ("RESUME", {}, Meaning(event=Event.RESUME)),
        ("WAKEUP", {}, Meaning(event=Event.RESUME)),
        (
            "SHUTDOWN",
            {"guest": True, "reason": "guest-panic"},
            Meaning(shutdown_reason="guest-panic", event=Event.GUEST_SHUTDOWN),
        ),
        ("SHUTDOWN", {}, Meaning(shutdown_reason="unknown", event=Event.GUEST_SHUTDOWN)),
        ("VSERPORT_CHANGE", {"id": "console0", "open": False}, Meaning()),
        ("VSERPORT_CHANGE", {}, Meaning()),
        ("RTC_CHANGE", {"offset": 78}, Meaning()),
    ],
)
def test_what_an_event_means(name: str, data: dict[str, object], meaning: Meaning) -> None:
    assert meaning_of(name, data) == meaning


@pytest.mark.parametrize(
    ("name", "data", "why", "came"),
    [
        ("SUSPEND", {}, "suspended itself", False),
        ("RESET", {"guest": True, "reason": "guest-reset"}, "was reset", False),
        ("VSERPORT_CHANGE", {"id": "agent0", "open": False}, "its agent has left", False),
        ("VSERPORT_CHANGE", {"id": "agent0", "open": True}, "its agent has left", True),
        ("VSERPORT_CHANGE", {"id": "agent0"}, "its agent has left", False),
    ],
)
def test_what_takes_the_agent_away(name: str, data: dict[str, object], why: str, came: bool) -> None:
    meaning = meaning_of(name, data)
    assert why in meaning.agent_left
    assert meaning.agent_came == came
    assert meaning.was_reset == (name == "RESET")
    assert meaning.event == (Event.SUSPEND if name == "SUSPEND" else None)


@given(
    st.sampled_from(["SHUTDOWN", "VSERPORT_CHANGE", "RESET"]) | st.text(max_size=5),
    st.dictionaries(st.sampled_from(["id", "open", "reason"]), st.none() | st.booleans() | st.just("agent0")),
)
def test_no_event_makes_it_fail(name: str, data: dict[str, object]) -> None:
    assert isinstance(meaning_of(name, data), Meaning)
