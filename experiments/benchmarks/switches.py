"""Each of our own switches against its alternatives, all else at its best: what it brings in time and in memory."""

from benchmarks.inputs import Setup
from benchmarks.report import Case
from benchmarks.training import BEST, describe, ours, same_losses, tolerance


def cases(setup: Setup) -> list[Case]:
    """A case for each switch that `TrainConfig` has; Buffer's own is in `stages`."""
    # Each switch's settings by name, and what they change of the best.
    whole = setup.train.batch_size * setup.train.max_length
    switches = {
        "layout": {
            "packed": {},
            "in buckets": {"packing": 0, "buckets": (128, 192, 256, 320, 384, 448)},
            "padded to max_length": {"packing": 0},
        },
        "loss": {"in chunks of answer tokens": {}, "one chunk of all tokens": {"loss_chunk": whole}},
        "remat": {f"remat {name}": {"remat": name} for name in ("none", "matmuls", "full")},
        "attention": {f"attention {name}": {"attention": name} for name in ("blocked", "xla")},
    }
    return [
        Case(
            f"switch {switch}",
            describe(setup),
            [ours(name, setup, **{**BEST, **changes}) for name, changes in settings.items()],
            "token",
            lambda outcomes: same_losses(outcomes, tolerance(setup)),
        )
        for switch, settings in switches.items()
    ]
