"""The choice of a turn's length: worth, and a bound to waiting."""

import random

import pytest

from br_jax.training.jobs import Schedule, fitting_lengths


def serve(schedule, jobs, turns):
    """Runs jobs (lists of row lengths, None for no job) side by side; returns lengths of turns, and waits by slot."""
    queues, lengths, waits = [list(job) for job in jobs], [], [[] for _ in jobs]
    waiting = [0] * len(jobs)
    for _ in range(turns):
        if not any(queues):
            break
        length = schedule.choose([queue[0] if queue else 0 for queue in queues])
        lengths.append(length)
        for slot, queue in enumerate(queues):
            if queue and queue[0] <= length:
                queue.pop(0)
                waits[slot].append(waiting[slot])
                waiting[slot] = 0
            elif queue:
                waiting[slot] += 1
    assert not any(queues), "somebody was not served"
    return lengths, waits


def test_all_alike_take_the_least_that_holds_them():
    lengths, _ = serve(Schedule((64, 128, 256), 3), [[60] * 5] * 3, 99)
    assert lengths == [64] * 5
    lengths, _ = serve(Schedule((64, 128, 256), 3), [[65] * 5] * 3, 99)
    assert lengths == [128] * 5


def test_one_long_among_short_costs_them_half_as_much_again_at_most():
    jobs = [[60] * 400] * 7 + [[256] * 1000]
    schedule = Schedule((64, 128, 256), 8)
    queues, tokens, turns = [list(job) for job in jobs], 0, 0
    while any(queues[:7]):
        length = schedule.choose([queue[0] if queue else 0 for queue in queues])
        tokens, turns = tokens + length, turns + 1
        for queue in queues:
            if queue and queue[0] <= length:
                queue.pop(0)
    assert turns == 400 and tokens <= 1.5 * 400 * 64 and len(queues[7]) < 1000


def test_many_long_do_not_wait_for_one_short():
    lengths, waits = serve(Schedule((64, 256), 4), [[250] * 50] * 3 + [[10] * 50], 999)
    assert lengths == [256] * 50 and not any(map(any, waits))


@pytest.mark.parametrize("seed", range(8))
def test_nobody_waits_beyond_the_bound(seed):
    rng, lengths = random.Random(seed), (64, 128, 512)
    # Hard ones: long among short, alternating, rare, and all at random.
    kinds = [lambda: 64, lambda: 512, lambda: rng.choice((1, 512)), lambda: rng.randint(1, 512), lambda: 65]
    jobs = [[rng.choice(kinds)() for _ in range(rng.randint(0, 300))] for _ in range(rng.randint(1, 12))]
    schedule = Schedule(lengths, len(jobs))
    taken, waits = serve(schedule, jobs, 10**5)
    bound = schedule.patience(lengths[0], lengths[-1])
    assert max(map(max, filter(None, waits)), default=0) <= bound
    assert set(taken) <= set(lengths)


def test_schedule_patience():
    schedule = Schedule((64, 256), 2)
    assert schedule.patience(64, 256) == 6 and schedule.patience(64, 64) == 0


def test_lengths_that_fit():
    """A tenth, half, nine tenths and all of the rows have a length of their own; then come longer ones."""
    assert fitting_lengths([100] * 90 + [300] * 10, 1024, "cpu") == (128, 320, 448, 608, 832, 1024)
    assert fitting_lengths([5], 64, "cpu") == (32, 64) and fitting_lengths([5], 64, "tpu") == (64,)
    assert fitting_lengths([900, 10], 896, "cpu")[-1] == 896
