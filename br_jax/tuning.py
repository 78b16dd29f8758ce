"""Tries of a method's settings on tuning seeds: every method has as many, and each one is on record."""

import ast
import copy
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from br_jax.core.errors import UserError, one_line
from br_jax.core.io import read_jsonl
from br_jax.core.records import key_of
from br_jax.core.store import Store
from br_jax.experiment.grid import Grid, run_sweep
from br_jax.experiment.protocol import role
from br_jax.report.results import find, one_a, results_of
from br_jax.report.verdicts import CLAIMS


def parse_try(text: str) -> dict[str, Any]:
    """Settings by path, of "path=value,path=value"; "" is the config as it is."""
    settings = {}
    for part in filter(None, text.split(",")):
        path, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--try={text}: write path=value, as defences.resta.strength=0.5")
        try:
            settings[path.strip()] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            settings[path.strip()] = value
    return settings


def run_tries(
    base: ConfigDict,
    workdir: str | os.PathLike,
    method: str,
    tries: Sequence[Mapping[str, Any]],
    budget: int,
    **axes: Any,
) -> list[dict[str, Any]]:
    """Scores tries on the validation split; those that are on record already are read back.

    Args:
        workdir: of the tries of all methods.
        tries: settings by path, each on top of `base`.
        budget: how many a method has, those on record among them.
        axes: of the grid, as `Grid`'s: its seeds, p and so on; the method's own a is the config's.

    Returns:
        All tries of the method on record, the best first: "try", "seeds", the mean "gaps" by claim, in shares, and
        "excess", the largest of them over its limit.

    Raises:
        UserError: a seed that is not for tuning, an unknown setting, or more tries than the budget.
    """
    workdir, base = pathlib.Path(workdir), copy.deepcopy(base)
    for seed in axes["seeds"]:
        if role(seed) != "tuning":
            raise UserError(f"seed {seed} is for {role(seed)}: tune on seeds below 50")
    base.eval.split = "validation"
    file = workdir / "tries.jsonl"
    known = {line["key"]: line for line in (read_jsonl(file) if file.exists() else []) if line["method"] == method}
    wanted = {key_of(method, dict(each), axes)[:16]: dict(each) for each in tries}
    if (new := len({*wanted} - {*known})) > budget - len(known):
        raise UserError(f"{method} has {budget} tries: {len(known)} are on record, and {new} more are asked for")
    store, shared = Store(file), {"models": [base.model.source], "a": [base.merge.a]} | axes
    for key, changes in wanted.items():
        if key in known:
            continue
        config = copy.deepcopy(base)
        try:
            config.update_from_flattened_dict(changes)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"--try: {one_line(error)}") from error
        cells = []
        for of, folder, methods in ((base, "base", ["aligned", "sft"]), (config, key, [method])):
            (workdir / folder).mkdir(parents=True, exist_ok=True)
            (workdir / "providers").mkdir(exist_ok=True)
            if not (link := workdir / folder / "providers").exists():  # what they are made of is the same
                link.symlink_to("../providers")
            cells += run_sweep(of, workdir / folder, Grid(methods=methods, **shared))
        gaps = {}
        for claim in CLAIMS:
            found = one_a(results_of(cells))
            each = [claim.gap(found, p, find(found, p, method).a.iloc[0], ours=method) for p in axes["p"]]
            gaps[claim.name] = max(one.mean for one in each if one)
        excess = max(gaps[claim.name] - claim.limit for claim in CLAIMS)
        store.add({key: {"method": method, "try": changes, "axes": axes, "gaps": gaps, "excess": excess}})
    return sorted((line for line in read_jsonl(file) if line["method"] == method), key=lambda line: line["excess"])
