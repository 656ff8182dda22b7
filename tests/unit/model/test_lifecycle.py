from __future__ import annotations

import pytest

from vmherd.model.lifecycle import ACTIVE, TRANSITIONS, Event, State, after, legal_states


def test_every_state_can_be_reached_and_left() -> None:
    reached = {State.STOPPED} | set(TRANSITIONS.values())
    left = {state for (state, _), then in TRANSITIONS.items() if then != state}
    assert reached == left == set(State)


def test_an_event_without_an_entry_changes_nothing() -> None:
    assert after(State.STOPPED, Event.STOP) is State.STOPPED


@pytest.mark.parametrize("state", sorted(ACTIVE))
def test_a_process_that_is_gone_ends_every_active_state(state: State) -> None:
    assert after(state, Event.DIED) is State.FAILED
    assert after(state, Event.ENDED) is State.STOPPED


@pytest.mark.parametrize("state", sorted(set(State) - ACTIVE))
@pytest.mark.parametrize("event", sorted(set(Event) - {Event.START}))
def test_only_a_start_wakes_what_has_ended(state: State, event: Event) -> None:
    assert after(state, event) is state


def test_unknown_is_never_dead() -> None:
    for state in State:
        assert after(state, Event.LOST) is (State.UNKNOWN if state in ACTIVE else state)


def test_legal_states() -> None:
    assert legal_states(Event.START) == {State.STOPPED, State.FAILED}
    assert legal_states(Event.STOP) == {
        State.STARTING,
        State.RUNNING,
        State.PAUSED,
        State.SUSPENDED,
        State.STOPPING,
    }
    assert legal_states(Event.PAUSE) == {State.RUNNING}
    assert legal_states(Event.RESUME) == {State.PAUSED, State.SUSPENDED}


@pytest.mark.parametrize("state", [State.STARTING, State.RUNNING, State.PAUSED, State.SUSPENDED, State.UNKNOWN])
def test_what_qemu_says_of_itself_holds(state: State) -> None:
    assert after(state, Event.UNDER_CONTROL) is State.RUNNING
    assert after(state, Event.UNDER_CONTROL_PAUSED) is State.PAUSED
    assert after(state, Event.UNDER_CONTROL_SUSPENDED) is State.SUSPENDED
