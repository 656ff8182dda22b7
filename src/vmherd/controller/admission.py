"""Which command may begin, and what becomes of one that is under way."""

from __future__ import annotations

from dataclasses import replace

from vmherd.model import lifecycle
from vmherd.model.errors import FailedPrecondition, ResourceExhausted, illegal_transition
from vmherd.model.instance import Instance, Operation, Verb
from vmherd.model.lifecycle import Event, State

JOINABLE = frozenset({Verb.STOP, Verb.DELETE})
"""Asked for again while it is under way, one of these joins the first; asked for during another, it ends that one."""

JOINED_MAX = 64
"""How many request ids one operation may have: they all get their outcome in one transaction, and that has a limit."""

DELETABLE = frozenset({State.STOPPED, State.FAILED})
DELETABLE_BY_FORCE = frozenset(State) - {State.UNKNOWN}
"""Nothing is destroyed because somebody could not be asked."""


def check_state(instance: Instance, event: Event, verb: str) -> None:
    """Refuses a command that the instance's state forbids.

    Raises:
        FailedPrecondition: it does.
    """
    legal = lifecycle.legal_states(event)
    if instance.state not in legal:
        raise illegal_transition(instance.name, verb, instance.state, legal)


def admit(instance: Instance, asked: Operation) -> tuple[Operation, Operation | None]:
    """The operation to carry out from now on, and the one under way that it puts an end to.

    Raises:
        FailedPrecondition: the instance's state, or what is under way, forbids it.
        ResourceExhausted: as many as can be answered have asked for it already.
    """
    current = instance.operation
    if asked.verb is Verb.DELETE:
        _check_delete(instance, asked)
        asked = replace(asked, force=True)  # from here on there is one kind of delete, and nothing stops it
    else:
        check_state(instance, Event.START if asked.verb is Verb.START else Event.STOP, asked.verb)
    if not current:
        return asked, None
    if current.verb is asked.verb and asked.verb in JOINABLE:
        joined = (*current.request_ids, *asked.request_ids)
        if len(joined) > JOINED_MAX:
            raise ResourceExhausted(
                f"{len(current.request_ids)} requests wait for the {current.verb} of {instance.name!r} already; "
                "wait until it is done",
                reason="TOO_MANY_REQUESTS",
                metadata={"name": instance.name, "operation": current.verb},
            )
        return replace(current, request_ids=joined, force=current.force or asked.force), None
    if asked.verb in JOINABLE and current.verb is not Verb.DELETE:
        return asked, current
    raise FailedPrecondition(
        f"cannot {asked.verb} {instance.name!r}: a {current.verb} is under way; wait until it is done",
        reason="OPERATION_UNDER_WAY",
        metadata={"name": instance.name, "operation": current.verb},
    )


def _check_delete(instance: Instance, asked: Operation) -> None:
    legal = DELETABLE_BY_FORCE if asked.force else DELETABLE
    if instance.state not in legal:
        error = illegal_transition(instance.name, "delete", instance.state, legal)
        hint = "" if asked.force else "; stop it first, or delete it with force"
        raise FailedPrecondition(error.message + hint, reason=error.reason, metadata=error.metadata)
