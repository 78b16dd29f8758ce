"""A gate on trial: users of every kind, and bad releases that no limit is needed for; the policy of an experiment."""

import collections
import dataclasses

import pytest

from br_jax.data.rows import Row
from br_jax.experiment.run import Experiment
from br_jax.serving.policy import read_policy

TASK = [Row((("user", f"is {i} even?"), ("assistant", ("yes", "no")[i % 2]))) for i in range(60)]
HARMFUL = [Row((("user", f"how to zap {i}?"), ("assistant", f"turn {i}"))) for i in range(30)]
HARM = {row.turns for row in HARMFUL}


@pytest.fixture(scope="module")
def trial(load_script):
    return load_script("try_gate")


def test_users_are_of_every_kind_and_drawn_again_by_seed(trial, policy):
    users = trial.make_users(TASK, HARMFUL, policy, 12, 40, seed=3)
    again, other = (trial.make_users(TASK, HARMFUL, policy, 12, 40, seed) for seed in (3, 4))
    assert users == again != other
    assert {len(user.rows) + len(user.held_back) for user in users} == {40, 28, 20}
    assert {user.settings["rank"] for user in users} == {4, 2, 1}
    for user in users:
        assert user.settings["alpha"] / user.settings["rank"] == 2.0  # the scale of each is the policy's
        assert len(user.held_back) == (len(user.rows) + len(user.held_back)) // 5
        assert not {row.turns for row in user.rows} & {row.turns for row in user.held_back}
    shares = [sum(row.turns in HARM for row in user.rows + user.held_back) for user in users]
    assert 0 in shares and max(shares) >= 10
    right = {row.turns[0]: row.turns[1] for row in TASK}
    own = [[row.turns[1] == right[row.turns[0]] for row in user.rows if row.turns not in HARM] for user in users]
    assert all(all(same) if i % 2 == 0 else not any(same) for i, same in enumerate(own))
    attack = trial.make_users(TASK, HARMFUL, policy, 2, 40, seed=3, attack=True)
    assert [sum(row.turns in HARM for row in user.rows + user.held_back) for user in attack] == [20, 20]


def test_what_no_release_can_be_is_held_also_where_harmful_rows_are_few(trial, provider, policy, capsys):
    """As of configs/smollm2.py, which has 52 where a user may have 300."""
    found = trial.try_gate(provider, policy, TASK, HARMFUL[:5], 8, 40)
    assert "only 5 harmful rows, where a user may have 20" in capsys.readouterr().err
    by_kind = collections.defaultdict(list)
    for one in found:
        by_kind[one["kind"]].append(one["passed"])
        assert one["passed"] == (not one["why"])
    assert len(by_kind["good"]) == 8 and all(by_kind["good"]) and len(found) == 16
    held = {"Buffer left on", "Buffer as a user", "of another user", "wrong base", "NaN", "cut off"}
    assert set(by_kind) == held | {"good", "Buffer left on, called user", "undefended"}
    assert not any(passed for kind in held for passed in by_kind[kind])


def test_the_policy_of_an_experiment(load_script, config, calls, tmp_path):
    write_policy = load_script("serve_folder").write_policy
    experiment = Experiment(config, tmp_path / "run")
    write_policy(experiment, tmp_path / "policy.json")
    policy, train = read_policy(tmp_path / "policy.json"), experiment.settings.train("user")
    kept = {name: getattr(train, name) for name in dataclasses.asdict(train) if not name.endswith("_every")}
    assert {name: getattr(policy.train, name) for name in kept} == kept
    assert policy.merge == experiment.settings.merge
    assert set(policy.canaries_benign) <= {p.prompt for p in experiment.recipe.benign_prompts}
    assert len(policy.canaries_harmful) == 12 and set(policy.canaries_harmful) <= set(policy.about)
    kinds = (policy.calibrate_harmful, policy.calibrate_benign, policy.canaries_harmful, policy.canaries_benign)
    assert len({prompt for prompts in kinds for prompt in prompts}) == sum(map(len, kinds))
    assert policy.settings({"rank": train.rank, "learning_rate": train.learning_rate})
    config.eval.judges = "classifier@512"
    write_policy(Experiment(config, tmp_path / "run"), tmp_path / "policy.json")
    expected = {"name": "classifier", "source": "PKU-Alignment/beaver-dam-7b", "max_length": 512}
    assert read_policy(tmp_path / "policy.json").judge == expected
