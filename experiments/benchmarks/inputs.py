"""The same rows, weights and first adapter for every contender, and what the cases need to know of them."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks.pairing import call
from br_jax.adapters.peft import save_adapter
from br_jax.core.errors import UserError
from br_jax.core.mesh import make_mesh
from br_jax.data.batches import encode_rows
from br_jax.data.rows import Row, read_rows
from br_jax.inference.generate import encode_prompt
from br_jax.models.io.hf import write_hf
from br_jax.provider import load_model
from br_jax.training.batching import step_batches
from br_jax.training.config import TrainConfig
from br_jax.training.run import first_adapter

HERE = pathlib.Path(__file__).parent
_LABELS = 872  # prompts of SST-2's development set


@dataclasses.dataclass(frozen=True)
class Setup:
    """What one run of the benchmarks is about.

    Attributes:
        model: arguments of `load_model`.
        rows: file of rows to train on and to answer; None where no case needs it.
        folder: for files that last as long as the benchmarks.
        rounds: timed units of each contender.
        prompts: rows that are answered in one batch; a case may take several.
        new_tokens: of each answer.
        threads: that the other side may use; XLA takes all cores.
        train: the protocol of the training cases; a step's rows are taken in the file's order.
    """

    model: dict[str, Any]
    rows: pathlib.Path | None
    folder: pathlib.Path
    rounds: int
    prompts: int
    new_tokens: int
    threads: int
    train: TrainConfig

    def read(self, count: int) -> list[Row]:
        """The first rows of the file; a `UserError` when none was given, or it holds too few."""
        if self.rows is None:
            raise UserError("--rows is missing: a JSONL file to train on and to answer, e.g. GSM8K's train.jsonl")
        rows = read_questions(self.rows, count)
        if len(rows) < count:
            raise UserError(f"{self.rows}: {len(rows)} rows: {count} are needed: give a longer file or fewer rounds")
        return rows

    @functools.cached_property
    def steps(self) -> TrainConfig:
        """The protocol, with a step for every unit."""
        return dataclasses.replace(self.train, steps=self.rounds + 1)

    @functools.cached_property
    def train_rows(self) -> list[Row]:
        """As many rows as all steps take."""
        return self.read(self.steps.steps * self.steps.batch_size)

    @functools.cached_property
    def prompt_rows(self) -> list[Row]:
        """The rows that are answered: four batches, or all of a task of labels where the file has so many."""
        self.read(4 * self.prompts)
        return read_questions(self.rows, _LABELS)

    @functools.cached_property
    def exported(self) -> dict[str, Any]:
        """What `export` gives; made once, in a process of its own."""
        return call(
            HERE / "inputs.py",
            "export",
            model=self.model,
            rows=self.train_rows,
            prompts=self.prompt_rows,
            config=self.steps,
            folder=self.folder,
        )


def require_torch(case: str) -> None:
    """Raises a `UserError` where the other side is not installed."""
    missing = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"benchmark {case}: {', '.join(missing)} not installed: pip install --editable '.[test]'")


def read_questions(path: pathlib.Path, count: int) -> list[Row]:
    """The first rows of a JSONL file in one of the project's layouts, or with GSM8K's `question` and `answer`."""
    try:
        with path.open(encoding="utf-8") as file:
            records = [json.loads(line) for line in itertools.islice(file, count)]
        return [Row((("user", record["question"]), ("assistant", record["answer"]))) for record in records]
    except (ValueError, KeyError, TypeError):
        return read_rows(path, max_rows=count)


def export(model: dict, rows: list[Row], prompts: list[Row], config: TrainConfig, folder: pathlib.Path):
    """A contender for `call`: writes the model and the first adapter for the other side.

    Returns:
        A unit whose outcome has "model" and "adapter", the folders; "steps", for each step its rows as (token ids,
        which of them are answer); "prompts", token ids up to the answer; "stops", tokens that end one; "params", how
        many; "device", its kind.
    """

    def unit(index: int):
        base = load_model(**model)
        write_hf(folder / "model", base.spec, base.params, base.tokenizer)
        adapter = first_adapter("user", "user", base, config)
        save_adapter(folder / "adapter", adapter, base_name=base.name, fingerprint=base.fingerprint)
        examples, _ = encode_rows(rows, base.tokenizer, base.template, config.max_length)
        padded = dataclasses.replace(config, buckets=(), packing=0)
        return 0, {
            "model": folder / "model",
            "adapter": folder / "adapter",
            "steps": [_rows_of(batch) for batch in step_batches(examples, padded, make_mesh())],
            "prompts": [encode_prompt(base, row) for row in prompts],
            "stops": tuple(base.stop_tokens),
            "params": sum(leaf.size for leaf in jax.tree.leaves(base.params)),
            "device": jax.devices()[0].device_kind,
        }

    return unit


def _rows_of(batch: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """A padded batch as rows of token ids, and of which of them are to be learnt."""
    rows = []
    for tokens, weights, segments in zip(batch["tokens"], batch["weights"], batch["segment_ids"], strict=True):
        n = int((segments > 0).sum())
        if not n:  # what fills up the last step of a pass
            continue
        rows.append((tokens[:n].astype(np.int64), np.concatenate([[False], weights[: n - 1] > 0])))
    return rows
