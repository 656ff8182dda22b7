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


def test_a_fall_takes_the_rungs_above_only() -> None:
    readiness = climb(Readiness(), *Rung).fall(Rung.QMP)
    assert readiness.reached is Rung.QMP
    assert climb(readiness, Rung.AGENT).reached is Rung.AGENT


def test_somebody_who_waits_is_told_what_for() -> None:
    assert set(WAITING_FOR) == set(Rung)
