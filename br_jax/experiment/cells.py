"""Cells: a method scored in a run, kept in a file, and known again by all that its scores depend on.

A *run* is one user's data: a model, a task, a kind of user, a topic of its harmful rows, n, p and a seed.
"""

import dataclasses
import functools
import os
import pathlib
import time
from typing import Any

from absl import logging

from br_jax.adapters import lora
from br_jax.adapters.diagnostics import geometry
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig
from br_jax.calibration import RULE
from br_jax.core.hosts import barrier, is_main, stop_if_asked
from br_jax.core.records import file_hash, key_of, read_record, write_record
from br_jax.experiment import suites
from br_jax.experiment.methods import DIRECTION, METHODS, PROVIDER_STAGES, Cell
from br_jax.experiment.run import Experiment
from br_jax.experiment.settings import TRAINED, Settings
from br_jax.scoring.statistics import read_score
from br_jax.scoring.suite import evaluate, rules_version

_REFUSED = 0.2  # share of the task's prompts above which a base that refuses them is warned of


@dataclasses.dataclass(frozen=True)
class Run:
    """One user's data."""

    model: str  # `model.source`
    task: str  # `user.task`
    topic: str  # `topics.user`, the topics that its harmful rows ask about
    n: int  # its rows
    p: float  # the share of them that is harmful
    seed: int  # of the data and of every stage's training
    user: str = "plain"  # `user.kind`, a name in `ATTACKERS`

    @classmethod
    def of(cls, settings: Settings) -> "Run":
        """The one that settings say."""
        user, topic = settings.user, settings.topics.user
        return cls(settings.model.source, user.task, topic, user.n, user.harmful_share, settings.seed, user.kind)

    @property
    def name(self) -> str:
        """Of its folder."""
        who = "" if self.user == "plain" else f"-{self.user}"
        topic = "+".join(pathlib.Path(topic).stem for topic in self.topic.split(","))
        return f"{self._model_name}-{self.task}-{topic}{who}-n{self.n}-p{self.p:g}-s{self.seed}"

    @property
    def _model_name(self) -> str:
        return pathlib.Path(self.model).name.removesuffix(".gguf") or "scratch"

    def settings(self, base: Settings, workdir: pathlib.Path) -> Settings:
        """The base's settings with this run's, and the provider's folder that it shares with others of its seed."""
        s = base.change(
            {
                "model.source": self.model,
                "seed": self.seed,
                "topics.user": self.topic,
                "user.task": self.task,
                "user.n": self.n,
                "user.harmful_share": self.p,
                "user.kind": self.user,
                **{f"{stage}.train.seed": self.seed for stage in TRAINED},
                "user.train.probe_every": 0,  # a table has no place for them
            }
        )
        if not s.provider:
            made_of = [dataclasses.asdict(getattr(s, part)) for part in ("model", "distill", *PROVIDER_STAGES)]
            topics, material = (s.topics.align, s.topics.provider), dataclasses.asdict(s.data.texts)
            # The paper's rows are files of a config, and whether the first counts is the user's setting.
            if s.data.material == "paper":
                files = {name: dataclasses.asdict(getattr(s.data, name)) for name in ("llm_lat", "alpaca")}
                material = [material, files, s.user.index_mode]
            prompts = s.data.material, material
            shared = key_of(made_of, topics, prompts, dataclasses.asdict(s.pretrain), self.seed)
            s = s.change({"provider": str(workdir / "providers" / f"{self._model_name}-s{self.seed}-{shared[:8]}")})
        plain = dataclasses.replace(self, user="plain")
        if self != plain and s.attacker.trains_plainly() and not s.user.folder:  # it only asks, or does, otherwise
            s = s.change({"user.folder": str(workdir / "runs" / plain.name)})
        return s


def make_cell(experiment: Experiment, cell: Cell, start: float) -> dict[str, Any]:
    """Scores a cell and writes its file.

    Args:
        start: of the clock, `time.perf_counter`; a run's first cell pays for its training.

    Returns:
        "run" (the fields of `Run`), "method", "a", "scores" (as `score` gives them), "seconds".
    """
    scores, settings = score(experiment, cell), experiment.settings
    run, seconds = Run.of(settings), time.perf_counter() - start
    made = {"run": dataclasses.asdict(run), **cell._asdict(), "scores": scores, "seconds": seconds}
    if is_main():
        record = {"settings": settings_key(settings, cell), "recipe": _recipe(settings, cell), **made}
        write_record(file_of(experiment.workdir, cell), record, indent=None)  # one line: an outcome a prompt
    barrier("cell")
    return made


def read_cell(folder: pathlib.Path, settings: Settings, cell: Cell) -> dict[str, Any] | None:
    """A finished cell, if its file was made with the same settings."""
    file = file_of(folder, cell)
    if not file.exists():
        return None
    record = read_record(file, "delete it and run the same command again")
    record.pop("recipe", None)
    if record.pop("settings") == settings_key(settings, cell):
        return record
    logging.warning("%s: made with other settings, or by an earlier br_jax: it is made again", file)
    return None


def file_of(folder: pathlib.Path, cell: Cell) -> pathlib.Path:
    """Where a cell is kept in its run's folder."""
    return folder / "cells" / f"{cell.name}.json"


def score(e: Experiment, cell: Cell) -> dict[str, Any]:
    """The scores of a cell (in process 0 alone); what is kept of its model's answers is not made again.

    They are those of `scoring.suite.evaluate`, "geometry": norms and cosines of the adapters that it is made of and
    of Buffer, and "merge": the settings of its merge, if it has one. Prompts, answers and verdicts go to
    cells/NAME.jsonl. Raises `Stopped`, see `hosts.stop_if_asked`.
    """
    stop_if_asked()
    method = METHODS[cell.method]
    released = [_released(e, cell, job) for job in range(1 if method.of_provider else len(e.jobs))]
    adapter = lora.stack([each for each, _ in released]) if len(released) > 1 else released[0][0]
    if adapter is not None and not method.of_provider:
        adapter = e.settings.attacker.after(adapter)
    model, adapter = suites.as_scored(e.settings, e.model(method.base), adapter, cell.name)
    home = e.provider if method.of_provider else e.trained
    stores = {"store": "answers", "verdicts": "verdicts", "forced": "forced"}
    scores = evaluate(
        model,
        dataclasses.replace(e.suite, instruction=e.defence(method.defence).instruction if method.defence else ""),
        adapter,
        name=cell.name,
        records=e.workdir / "cells" / f"{cell.name}.jsonl",
        **{name: e.store(home, file) for name, file in stores.items()},
    )
    parts = dict.fromkeys((*method.needs, "buffer")) if method.needs else ()
    scores |= {"geometry": geometry({name: e.adapter(name) for name in parts}), "suite": e.suite.key[:16]}
    if (merge := released[0][1]) is not None:
        scores |= {"merge": dataclasses.asdict(merge)}
    refused = read_score(scores.get("task_refused")).score or 0.0
    if is_main() and cell.method == "aligned" and refused > _REFUSED:
        logging.warning(
            "the aligned base refuses %.0f %% of the task's prompts: what a user learns beside Buffer loses "
            "by that when Buffer is taken out; align it on benign prompts of such kinds too",
            100 * refused,
        )
    return scores if is_main() else {}


def _released(e: Experiment, cell: Cell, job: int) -> tuple[Adapter | None, MergeConfig | None]:
    """What a method puts on its base, and the merge that it is of, if it is."""
    method = METHODS[cell.method]
    if method.merge is not None:
        user, reinforce = method.needs
        strength = {"a": cell.a} if method.merges else {}
        merge = dataclasses.replace(e.merge_of(user, reinforce, job, **strength, **method.merge), **method.after)
        return e.merged(user, reinforce, merge, job), merge
    adapters = [e.adapter(name, job) for name in method.needs]
    if method.defence:
        return e.defence(method.defence).release(e.case(method.defence, job), *adapters), None
    return lora.stack(adapters) if len(adapters) > 1 else next(iter(adapters), None), None


def settings_key(settings: Settings, cell: Cell) -> str:
    """A hash of all that a cell's scores depend on, with what is in the files that the settings name."""
    shared, own, attacker = _apart(settings, cell)
    calibrates = settings.calibrate.harmful and {"reinforce", DIRECTION} & {*METHODS[cell.method].needs}
    rule = RULE if calibrates else ()
    parts = *([attacker] if attacker else []), *rule, rules_version()
    return key_of(shared, own, *cell, *parts, _contents(shared))


def _recipe(settings: Settings, cell: Cell) -> tuple[str, str]:
    """Hashes of what all seeds and shares of a table should share, and of the method's own settings."""
    alike = dataclasses.replace(Run.of(settings), p=0.0, seed=0).settings(settings, pathlib.Path())
    shared, own, attacker = _apart(alike, cell)
    return key_of(shared, attacker, rules_version()), key_of(own)


def _apart(settings: Settings, cell: Cell) -> tuple[dict, dict | None, dict]:
    """What scores depend on: the settings of all, the method's own where it has some, and the user's."""
    shared = dataclasses.asdict(settings)
    for name in ("provider", "mesh"):
        del shared[name]
    rivals, attackers, _ = shared.pop("defences"), shared.pop("attackers"), shared["user"].pop("folder")
    return shared, rivals.get(METHODS[cell.method].defence), attackers[settings.user.kind]


def _contents(settings: Any) -> list[str]:
    """Hashes of the files that settings name, one or several with commas between."""
    if isinstance(settings, dict):
        return [found for _, value in sorted(settings.items()) for found in _contents(value)]
    paths = [path.strip() for path in settings.split(",")] if isinstance(settings, str) else []
    found = []
    for path in (path for path in paths if os.sep in path or "." in path):
        files = [path] if os.path.isfile(path) else []
        if os.path.isdir(path):
            files = sorted(
                each.path for each in os.scandir(path) if each.name.endswith((".json", ".jinja", ".safetensors"))
            )
        found += [_content(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    return found


@functools.cache
def _content(file: str, size: int, changed: int) -> str:  # once for each time of change, which is no part of it
    return file_hash(file)
