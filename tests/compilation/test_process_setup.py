"""The note on threads that have no core of their own."""

import pytest

from ppvae.compilation.process_setup import CpuTime, busy_cores_note, cpu_time

START = CpuTime(wall=100.0, machine=1000.0, own=5.0)


def after(seconds, others, own):
    """The moment after so many seconds, in which others used `others` cores, and this process `own` cores."""
    return CpuTime(100.0 + seconds, 1000.0 + seconds * (others + own), 5.0 + seconds * own)


@pytest.mark.parametrize(
    ("threads", "cores", "others", "own", "cure"),
    [(2, 2, 1.6, 0.4, 1), (2, 2, 1.0, 1.0, 1), (8, 8, 4.1, 2.0, 4), (16, 8, 0.0, 1.0, 8), (2, 2, 2.0, 0.0, 1)],
)
def test_more_threads_than_idle_cores_are_named_with_the_number_to_set(threads, cores, others, own, cure):
    note = busy_cores_note(START, after(3.0, others, own), threads, cores)
    assert f"{threads} threads" in note
    assert note.endswith(f"OMP_NUM_THREADS={cure}")
    assert not busy_cores_note(START, after(3.0, others, own), cure, cores), "the cure is silent"


@pytest.mark.parametrize(
    ("threads", "cores", "others", "own"),
    [(2, 2, 0.1, 1.9), (1, 2, 2.0, 0.0), (2, 2, 0.4, 0.0), (4, 8, 3.9, 4.0)],
)
def test_threads_that_have_cores_are_no_reason_for_a_note(threads, cores, others, own):
    assert not busy_cores_note(START, after(3.0, others, own), threads, cores)


def test_a_short_time_or_an_unknown_one_says_nothing():
    assert not busy_cores_note(START, after(0.5, 2.0, 0.0), 2, 2)
    assert not busy_cores_note(None, START, 2, 2)
    now = cpu_time()
    assert now is None or now.machine > 0
