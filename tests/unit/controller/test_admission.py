"""Which command may begin, and what becomes of one that is under way."""

from __future__ import annotations

import pytest

from vmherd.controller.admission import JOINED_MAX, admit
from vmherd.controller.store.base import PUTS_MAX
from vmherd.model.errors import FailedPrecondition, ResourceExhausted
from vmherd.model.instance import Hardware, Instance, Operation, Verb
from vmherd.model.lifecycle import State


def instance(state: State, operation: Operation | None = None) -> Instance:
    return Instance("web", "uid", "builtin", Hardware(1, 128), {}, 0.0, state=state, operation=operation)


def op(verb: Verb, *request_ids: str, force: bool = False) -> Operation:
    return Operation(f"{verb}-id", verb, request_ids, force)


@pytest.mark.parametrize(
    ("verb", "legal"),
    [
        (Verb.START, {State.STOPPED, State.FAILED}),
        (Verb.STOP, {State.STARTING, State.RUNNING, State.PAUSED, State.SUSPENDED, State.STOPPING}),
        (Verb.RESTART, {State.STARTING, State.RUNNING, State.PAUSED, State.SUSPENDED, State.STOPPING}),
        (Verb.DELETE, {State.STOPPED, State.FAILED}),
    ],
)
@pytest.mark.parametrize("state", list(State))
def test_the_state_decides(verb: Verb, legal: set[State], state: State) -> None:
    if state in legal:
        assert admit(instance(state), op(verb)) == (op(verb, force=verb is Verb.DELETE), None)
    else:
        with pytest.raises(FailedPrecondition) as raised:
            admit(instance(state), op(verb))
        assert raised.value.reason == "ILLEGAL_STATE"
        assert raised.value.metadata["state"] == state
        assert all(name in str(raised.value) for name in ["web", state, *legal])


def test_a_delete_of_a_running_instance_says_what_to_do() -> None:
    with pytest.raises(FailedPrecondition, match="stop it first, or delete it with force"):
        admit(instance(State.RUNNING), op(Verb.DELETE))


@pytest.mark.parametrize("state", list(State))
def test_force_deletes_everything_but_what_cannot_be_asked(state: State) -> None:
    asked = op(Verb.DELETE, force=True)
    if state is State.UNKNOWN:
        with pytest.raises(FailedPrecondition):
            admit(instance(state), asked)
    else:
        assert admit(instance(state), asked) == (asked, None)


def test_a_second_stop_joins_the_first() -> None:
    first = op(Verb.STOP, "a")
    joined, superseded = admit(instance(State.STOPPING, first), Operation("other", Verb.STOP, ("b",), force=True))
    assert superseded is None
    assert (joined.id, joined.request_ids, joined.force) == (first.id, ("a", "b"), True)


def test_no_more_join_than_one_transaction_can_answer() -> None:
    first = op(Verb.STOP, *(str(number) for number in range(JOINED_MAX)))
    with pytest.raises(ResourceExhausted, match="64 requests wait for the stop of 'web' already"):
        admit(instance(State.STOPPING, first), op(Verb.STOP, "one-more"))
    assert admit(instance(State.STOPPING, first), op(Verb.STOP))[0] == first
    a_superseding_delete = JOINED_MAX + len(("the instance", "its own request"))
    assert a_superseding_delete <= PUTS_MAX


def test_force_is_never_taken_back() -> None:
    joined, _ = admit(instance(State.STOPPING, op(Verb.STOP, force=True)), op(Verb.STOP))
    assert joined.force


@pytest.mark.parametrize("current", [Verb.LAUNCH, Verb.START, Verb.RESTART])
def test_a_stop_ends_a_start_under_way(current: Verb) -> None:
    state = State.STOPPING if current is Verb.RESTART else State.STARTING
    assert admit(instance(state, op(current)), op(Verb.STOP)) == (op(Verb.STOP), op(current))


@pytest.mark.parametrize(
    ("state", "current", "asked"),
    [
        (State.STOPPING, Verb.STOP, Verb.RESTART),
        (State.STOPPED, Verb.LAUNCH, Verb.START),
        (State.STOPPED, Verb.DELETE, Verb.START),
        (State.STOPPING, Verb.DELETE, Verb.STOP),
    ],
)
def test_other_commands_wait_their_turn(state: State, current: Verb, asked: Verb) -> None:
    with pytest.raises(FailedPrecondition, match=f"a {current} is under way") as raised:
        admit(instance(state, op(current)), op(asked))
    assert raised.value.reason == "OPERATION_UNDER_WAY"
