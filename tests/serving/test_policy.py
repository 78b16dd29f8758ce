"""A policy is read strictly: what is wrong with it is one line that names it."""

import json

import pytest

from br_jax.core.errors import UserError
from br_jax.serving.policy import read_policy

PROMPTS = [
    {"prompt": f"{use} {kind} {i}", "kind": kind, "use": use}
    for use in ("calibrate", "canary")
    for kind in ("harmful", "benign")
    for i in range(3)
]


@pytest.fixture
def write(tmp_path):
    """write(lines=..., **policy) -> the path of a policy."""

    def make(lines=PROMPTS, **policy):
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in lines))
        (tmp_path / "policy.json").write_text(json.dumps({"prompts": "prompts.jsonl", **policy}))
        return tmp_path / "policy.json"

    return make


def test_what_is_not_said_has_defaults(write):
    policy = read_policy(write(train={"rank": 4, "targets": ["q"]}, merge={"a": 0.5}, limits={"answered": 0.2}))
    assert (policy.train.rank, policy.train.targets, policy.slots) == (4, ("q",), 8)
    assert (policy.merge.a, policy.merge.scale) == (0.5, 0.65)
    assert (policy.limits.answered, policy.limits.over_refused) == (0.2, 0.15)
    assert policy.canaries_harmful == ["canary harmful 0", "canary harmful 1", "canary harmful 2"]
    assert policy.calibrate_benign[0] == "calibrate benign 0"
    assert policy.key != read_policy(write(limits={"answered": 0.1})).key


WRONG = [
    ({"slot": 3}, "unknown setting 'slot'; near: slots"),
    ({"slots": "3"}, "slots is '3'"),
    ({"train": {"lerning_rate": 1}}, "train: unknown setting 'lerning_rate'; near: learning_rate"),
    ({"train": []}, "train is no object"),
    ({"train": {"rank": -1}}, "train: rank is -1"),
    ({"merge": {"a": 2}}, "merge: a is 2"),
    ({"limits": {"answered": None}}, "limits: answered is None"),
    ({"quotas": {"rows": 1e9}}, "quotas: rows is 1000000000.0"),
    ({"users_may_set": {"dropout": [0, 1]}}, "'dropout' is no setting of a job's own"),
    ({"users_may_set": {"epochs": [3, 1]}}, "epochs is [3, 1]: give [least, most]"),
    ({"users_may_set": {"epochs": 3}}, "epochs is 3: give [least, most]"),
    ({"users_may_set": [1]}, "users_may_set is no object"),
    ({"prompts": 3}, "is no policy: give an object"),
    ({"prompts": "absent.jsonl"}, "absent.jsonl: no such file"),
    ({"canaries_harmful": ["x"]}, "unknown setting 'canaries_harmful'"),
    ({"lines": []}, "no harmful prompt of use calibrate"),
    ({"lines": [p for p in PROMPTS if (p["kind"], p["use"]) != ("benign", "canary")]}, "no benign prompt of use"),
    ({"lines": [*PROMPTS, PROMPTS[0]]}, "the same prompt as"),
    ({"lines": [*PROMPTS, {"prompt": " ", "kind": "harmful", "use": "canary"}]}, 'give "prompt", a text'),
    ({"lines": [*PROMPTS, {"prompt": "x", "kind": "bad", "use": "canary"}]}, "harmful or benign"),
]


@pytest.mark.parametrize(("policy", "said"), WRONG)
def test_wrong_policies_and_prompts(write, policy, said):
    with pytest.raises(UserError) as error:
        read_policy(write(**policy))
    assert said in str(error.value)


def test_a_key_that_is_there_twice(write):
    path = write()
    path.write_text('{"prompts": "prompts.jsonl", "slots": 8, "slots": 16}')
    with pytest.raises(UserError, match=r"policy\.json: not valid JSON .key 'slots' twice"):
        read_policy(path)


def test_a_users_settings(write):
    policy = read_policy(write(users_may_set={"epochs": [1, 3], "learning_rate": [1e-5, 1e-3]}))
    assert policy.settings({"epochs": 2, "learning_rate": 1e-4}) == {"epochs": 2, "learning_rate": 1e-4}
    for asked in ({"rank": 2}, *({"epochs": value} for value in (4, True, "2", [2], float("nan")))):
        with pytest.raises(UserError, match=r"a user may set it from 1 to 3|is not a user's to set"):
            policy.settings(asked)
