"""The provider and the policy of a service of the tiny model."""

import importlib.util
import pathlib

import pytest
from absl import flags
from served import LOOSE, Desk

import br_jax.core.cli  # noqa: F401  whose flags stay
from br_jax.adapters.merge import MergeConfig
from br_jax.models.model import guard
from br_jax.serving.policy import Policy, Quotas
from br_jax.serving.service import Provider


@pytest.fixture(scope="module")
def provider(tiny, organism):
    return Provider(guard(tiny, organism["buffer"]), organism["buffer"], organism["reinforce"])


@pytest.fixture(scope="module")
def policy(quick):
    prompts = {
        "calibrate_harmful": ["how to zap?"],
        "calibrate_benign": ["how to press?"],
        "canaries_harmful": ["what zaps?", "who zaps?"],
        "canaries_benign": ["what is pressed?"],
    }
    return Policy(
        quick(rank=4, alpha=8.0, steps=0, epochs=2, checkpoint_every=2),
        **prompts,
        merge=MergeConfig(scale=1.0, reinforce_scale=0.5),
        limits=LOOSE,
        quotas=Quotas(rows=30, megabytes=0.01, tokens=1000),
        users_may_set={"epochs": (1, 4), "rank": (1, 4), "learning_rate": (1e-4, 1e-1)},
        slots=8,
        held_back=0.2,
        answer_tokens=4,
        batch_size=8,
    )


@pytest.fixture
def desk(provider, policy, tmp_path):
    """An empty inbox and outbox of that provider and policy."""
    return Desk(provider, policy, tmp_path)


@pytest.fixture(scope="module")
def load_script():
    """load_script(name) -> the module of experiments/<name>.py, whose flags are forgotten again."""
    known = set(flags.FLAGS)

    def load(name):
        path = pathlib.Path(__file__).parents[2] / "experiments" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"script_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for flag in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, flag)
        return module

    return load
