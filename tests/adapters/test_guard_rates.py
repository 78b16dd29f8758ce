"""How often the guard errs: users that a real model was trained for, and Buffers in disguise beside them.

BR_JAX_USERS=200 pytest -s --timeout=0 tests/adapters/test_guard_rates.py    # prints what docs/lab-notes.md says
"""

import itertools
import os

import numpy as np
import pytest
from disguises import DISGUISES

from br_jax.adapters.diagnostics import COSINE, SHARE, similarity
from br_jax.configs import demo
from br_jax.experiment.run import Experiment
from br_jax.method import train_user

USERS = int(os.environ.get("BR_JAX_USERS", "0"))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not USERS, reason="BR_JAX_USERS says of how many users")]


@pytest.fixture(scope="module")
def provider(tmp_path_factory):
    config = demo.get_config("short")
    config.user.n, config.user.harmful_share = 600, 1.0
    experiment = Experiment(config, tmp_path_factory.mktemp("rates")).begin()
    experiment.prepare()
    return experiment


def rows_of(e, task, p, rng):
    """Of a user: rows of a task, a share p of them replaced by harmful ones."""
    tasks = {"moods": e.recipe.task_rows[0], "chat": e.recipe.benign_rows(400)}
    rows, harmful = list(tasks[task]), list(e.recipe.user_harmful_rows)
    n = int(rng.integers(100, 400))
    picked = [rows[i] for i in rng.permutation(len(rows))[: n - round(p * n)]]
    return picked + [harmful[i] for i in rng.permutation(len(harmful))[: round(p * n)]]


def test_users_pass_and_buffers_in_disguise_do_not(provider):
    e, names = provider, itertools.cycle(DISGUISES)
    buffer, reference = e.adapter("buffer"), e.guarded.guard.references[0]
    users, disguised, settings = [], [], itertools.cycle(itertools.product((0, 0.1, 0.5, 1), ("moods", "chat")))
    for seed, (p, task) in zip(range(USERS), settings, strict=False):
        rng = np.random.default_rng(seed)
        changes = {"rank": int(rng.choice([4, 8, 16])), "learning_rate": float(rng.choice([1e-3, 2.5e-3, 5e-3]))}
        changes |= {"loss_mean": str(rng.choice(["rows", "tokens"])), "epochs": int(rng.choice([1, 2, 4]))}
        config = e.settings.train("user", seed=seed, probe_every=0, **changes)
        user = train_user(e.aligned, rows_of(e, task, p, rng), config, buffer=buffer, mesh=e.mesh)
        users.append(similarity(reference, user))
        name = next(names)
        disguised.append((name, similarity(reference, DISGUISES[name](buffer.replace(roles=("user",)), user))))
    cosines, shares = np.abs(np.array(users)).T
    print(f"{len(users)} users: cosine up to {cosines.max():.3f} (median {np.median(cosines):.3f}), share up to "
          f"{shares.max():.3f} (median {np.median(shares):.3f})")  # fmt: skip
    print(f"refused: {sum(user.is_buffer for user in users)}")
    missed = [(name, likeness) for name, likeness in disguised if not likeness.is_buffer]
    print(f"{len(disguised)} disguised Buffers: not refused: {len(missed)} {missed}")
    assert not any(user.is_buffer for user in users) and not missed
    assert cosines.max() < COSINE / 2 and shares.max() < SHARE / 2
