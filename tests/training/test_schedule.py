"""The choice of a pool step's length: worth, and a bound to waiting."""

import random

import pytest

from br_jax.training.jobs import Schedule, fitting_lengths


def serve(schedule, jobs, most=10**5):
    """Runs jobs (lists of row lengths) side by side; returns lengths of steps, waits by slot, and rows left."""
    queues, lengths, waits = [list(job) for job in jobs], [], [[0] for _ in jobs]
    while any(queues) and len(lengths) < most:
        length = schedule.choose([queue[0] if queue else 0 for queue in queues])
        lengths.append(length)
        for queue, waited in zip(queues, waits, strict=True):
            if queue and queue[0] <= length:
                queue.pop(0)
                waited.append(0)
            elif queue:
                waited[-1] += 1
    return lengths, [max(waited) for waited in waits], [len(queue) for queue in queues]


def test_steps_are_as_long_as_most_need_and_nobody_waits_for_few():
    assert serve(Schedule((64, 128, 256), 3), [[60] * 5] * 3)[0] == [64] * 5
    assert serve(Schedule((64, 128, 256), 3), [[65] * 5] * 3)[0] == [128] * 5
    assert serve(Schedule((64, 256), 4), [[250] * 50] * 3 + [[10] * 50])[:2] == ([256] * 50, [0] * 4)
    schedule = Schedule((64, 256), 2)
    assert schedule.patience(64, 256) == 6 and schedule.patience(64, 64) == 0


def test_one_long_among_short_costs_them_half_as_much_again_at_most():
    lengths, _, left = serve(Schedule((64, 128, 256), 8), [[60] * 400] * 7 + [[256] * 1000], most=400)
    assert left[:7] == [0] * 7 and sum(lengths) <= 1.5 * 400 * 64 and left[7] < 1000


@pytest.mark.parametrize("seed", range(8))
def test_nobody_waits_beyond_the_bound(seed):
    rng, lengths = random.Random(seed), (64, 128, 512)
    # Hard ones: long among short, alternating, rare, and all at random.
    kinds = [lambda: 64, lambda: 512, lambda: rng.choice((1, 512)), lambda: rng.randint(1, 512), lambda: 65]
    jobs = [[rng.choice(kinds)() for _ in range(rng.randint(0, 300))] for _ in range(rng.randint(1, 12))]
    schedule = Schedule(lengths, len(jobs))
    taken, waits, left = serve(schedule, jobs)
    assert not any(left) and max(waits) <= schedule.patience(lengths[0], lengths[-1]) and set(taken) <= set(lengths)


def test_lengths_that_fit():
    """A tenth, half, nine tenths and all of the rows have a length of their own; then come longer ones."""
    assert fitting_lengths([100] * 90 + [300] * 10, 1024, "cpu") == (128, 320, 448, 608, 832, 1024)
    assert fitting_lengths([5], 64, "cpu") == (32, 64) and fitting_lengths([5], 64, "tpu") == (64,)
    assert fitting_lengths([900, 10], 896, "cpu")[-1] == 896
