"""Paired benchmarks: training and generation against PEFT and transformers, the merge, and our own switches.

python experiments/bench.py --config=configs/smollm2.py --rows=gsm8k_train.jsonl [--cases=training,merge] [--json=F]

Every contender works in a process of its own and they take turns, so that other load hits all alike: believe the ratios
of a round, not the seconds. Exit status: 0 done, 2 bad input or something missing.
"""

import dataclasses
import importlib
import os
import pathlib
import tempfile

from absl import flags
from ml_collections import config_flags

from br_jax.core.cli import require_flags, run_with_flags
from br_jax.core.errors import UserError

CASES = ("limits", "training", "generation", "merge", "loading", "stages", "switches", "pool", "defences")
CONFIG = config_flags.DEFINE_config_file("config", None, "Config file with a model.source, e.g. configs/smollm2.py.")
WANTED = flags.DEFINE_list("cases", list(CASES), "Cases to run.")
ROWS = flags.DEFINE_string("rows", None, "JSONL file of rows, GSM8K's question/answer or one of the project's layouts.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds; a ratio is taken in each.", lower_bound=1)
DROPOUT = flags.DEFINE_float("dropout", 0.0, "Of the trained adapter, on both sides.", 0, 0.99)
JSON = flags.DEFINE_string("json", None, "File for the figures.")


def main(argv: list[str]) -> None:
    """Flags and calls."""
    from benchmarks.inputs import Setup
    from benchmarks.report import describe_machine, run_case
    from benchmarks.training import PROTOCOL

    from br_jax.core.io import write_json
    from br_jax.models.kernels import resolve_precision

    require_flags(argv, CONFIG)
    for name in WANTED.value:
        if name not in CASES:
            raise UserError(f"--cases: {name!r} is no case: use {', '.join(CASES)}")
    model = {field: CONFIG.value.model[field] for field in ("source", "template", "dtype")}
    model["matmul_precision"] = resolve_precision(CONFIG.value.model.matmul_precision, model["dtype"])
    machine = describe_machine()
    print(f"machine: {machine}")
    results = {}
    with tempfile.TemporaryDirectory(prefix="br_jax-bench-") as folder:
        setup = Setup(
            model=model,
            rows=pathlib.Path(ROWS.value) if ROWS.value else None,
            folder=pathlib.Path(folder),
            rounds=ROUNDS.value,
            prompts=64,
            new_tokens=128,
            threads=os.cpu_count(),
            train=dataclasses.replace(PROTOCOL, dropout=DROPOUT.value),
        )
        for name in WANTED.value:
            for case in importlib.import_module(f"benchmarks.{name}").cases(setup):
                results[case.name] = run_case(case, ROUNDS.value)
                if JSON.value:
                    write_json(JSON.value, {"machine": machine, "cases": results})


if __name__ == "__main__":
    run_with_flags(main)
