from __future__ import annotations

from vmherd.model.readiness import WAITING_FOR, Readiness, Rung


def climb(readiness: Readiness, *rungs: Rung, now_s: float = 12.5) -> Readiness:
    for rung in rungs:
        readiness = readiness.climb(rung, now_s=now_s, accepted_at_s=10.0)
    return readiness


def test_rungs_are_climbed_one_after_another_with_their_times() -> None:
    readiness = climb(Readiness(), Rung.PROCESS, Rung.QMP)
    assert readiness.reached is Rung.QMP
    assert [(step.rung, step.reached_at_s, step.elapsed_s) for step in readiness.steps] == [
        (Rung.PROCESS, 12.5, 2.5),
        (Rung.QMP, 12.5, 2.5),
    ]


def test_a_rung_keeps_the_time_at_which_it_was_reached_first() -> None:
    readiness = climb(climb(Readiness(), Rung.PROCESS), Rung.PROCESS, now_s=99)
    assert readiness.steps[0].reached_at_s == 12.5


def test_no_rung_is_left_out() -> None:
    assert climb(Readiness(), Rung.AGENT).reached is None


def test_a_clock_that_was_set_back_gives_no_negative_time() -> None:
    assert climb(Readiness(), Rung.PROCESS, now_s=3).steps[0].elapsed_s == 0


def test_an_address_without_an_agent_is_reached_and_the_ladder_is_not() -> None:
    readiness = climb(Readiness(), Rung.PROCESS, Rung.QMP, Rung.ADDRESS)
    assert readiness.has(Rung.ADDRESS)
    assert not readiness.has(Rung.AGENT)
    assert readiness.reached is Rung.QMP


def test_an_agent_that_is_later_than_the_address_completes_the_ladder() -> None:
    readiness = climb(climb(Readiness(), Rung.PROCESS, Rung.QMP, Rung.ADDRESS), Rung.AGENT, now_s=14)
    assert readiness.reached is Rung.ADDRESS
    assert [(step.rung, step.elapsed_s) for step in readiness.steps[2:]] == [(Rung.AGENT, 4), (Rung.ADDRESS, 2.5)]


def test_nothing_is_reached_without_the_process() -> None:
    assert climb(Readiness(), Rung.ADDRESS) == climb(Readiness(), Rung.QMP) == Readiness()


def test_an_agent_that_leaves_takes_no_other_rung_along() -> None:
    readiness = climb(Readiness(), *Rung).without(Rung.AGENT)
    assert readiness.reached is Rung.QMP
    assert readiness.has(Rung.ADDRESS)
    assert climb(readiness, Rung.AGENT, now_s=14).reached is Rung.ADDRESS


def test_somebody_who_waits_is_told_what_for() -> None:
    assert set(WAITING_FOR) == set(Rung)
