"""One user's experiment: the stages of one config in one folder. Every result is made or read back at first use.

On several processes every stage runs on the devices of all of them; files are process 0's work, which the others read.
"""

import copy
import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence

import jax
from absl import logging
from ml_collections import ConfigDict

from br_jax import method
from br_jax.adapters import lora
from br_jax.adapters.diagnostics import geometry
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.adapters.peft import load_adapter, read_provenance
from br_jax.attackers.attacker import Attacker
from br_jax.calibration import RULE, calibrate
from br_jax.core.errors import UserError, look_up
from br_jax.core.hashes import key_of
from br_jax.core.hosts import is_main, stop_if_asked
from br_jax.core.io import make_private, write_json
from br_jax.core.mesh import make_mesh
from br_jax.core.store import Store
from br_jax.data.rows import Row
from br_jax.defences.defence import Case, Defence
from br_jax.defences.registry import DEFENCES
from br_jax.experiment.methods import ADAPTERS, METHODS, OF_ALIGNMENT, PROVIDER_STAGES, Cell, provided
from br_jax.experiment.recipe import question_key
from br_jax.experiment.recipe_invented import TopicRecipe
from br_jax.experiment.recipe_public import PaperRecipe
from br_jax.experiment.settings import check_settings, check_sizes
from br_jax.experiment.suites import OF_TOPICS, as_scored, calibration_judge, check_judges, make_suite
from br_jax.inference.answers import answer
from br_jax.models.decoder import init_params
from br_jax.models.io.hf import write_hf
from br_jax.models.io.hub import is_hub_name
from br_jax.models.io.load import read_spec
from br_jax.models.model import Model, fold_adapter, guard, make_model
from br_jax.models.spec import ModelSpec
from br_jax.models.tokenizer import byte_tokenizer
from br_jax.provider.export import export_adapter
from br_jax.provider.folder import RECORDED_ADAPTERS, base_of, load_model, record_adapter, write_provider
from br_jax.scoring.judges.judging import Judge
from br_jax.scoring.statistics import read_score
from br_jax.scoring.suite import DEGENERATE, Suite, evaluate, rules_version
from br_jax.training.batching import gradient_norms
from br_jax.training.config import TrainConfig
from br_jax.training.run import rows_fingerprint, train_adapter, train_params

ENTERED = (*PROVIDER_STAGES, "user")  # stages that an adapter made elsewhere can take the place of
_REFUSED = 0.2  # share of the task's prompts beyond which a refusing base is said


@functools.cache
def _read_spec(source: str | os.PathLike, revision: str | None) -> ModelSpec:
    """`read_spec`, once for all runs of a sweep: the header of a GGUF file takes seconds."""
    return read_spec(source, revision)


def job_folders(trained: pathlib.Path, attacker: Attacker) -> list[pathlib.Path]:
    """Where each of a user's jobs is trained, in the folder of what is trained on its rows."""
    return [trained] if attacker.jobs == 1 else [trained / f"job{i}" for i in range(attacker.jobs)]


class Experiment:
    """The models, rows and scores of one config in one workdir.

    Nothing is written before `begin`.

    Args:
        config: see configs/base.py.
        workdir: the same config comes back to the same workdir, another one is refused.

    Raises:
        UserError: a number out of bounds, or a setting that no recipe or mesh can be made of.
    """

    def __init__(self, config: ConfigDict, workdir: str | os.PathLike):
        check_settings(config)
        self.config = config
        self.workdir = pathlib.Path(workdir)
        self.provider = pathlib.Path(config.provider) if config.provider else self.workdir / "provider"
        self.trained = pathlib.Path(config.user.folder) if config.user.folder else self.workdir
        self.mesh = make_mesh(**config.mesh)
        self._model_mesh = self.mesh if self.mesh.size > 1 else None  # None is the one device that there is
        paper = config.data.material == "paper"
        self.recipe = PaperRecipe(config) if paper else TopicRecipe(config, self._answer)
        self.recipe.appetite = self._appetite
        self.provider_run = {"workdir": self.provider, "mesh": self.mesh}  # how the provider's stages are run
        self._adapters: dict[str, Adapter] = {}
        self._bases: dict[str, Model] = {}
        self._merged: dict[tuple[str, str, MergeConfig], Adapter] = {}
        self._stores: dict[pathlib.Path, Store] = {}

    def begin(self) -> "Experiment":
        """Makes the provider's folder, for its owner alone; nothing is written before."""
        if is_main():
            make_private(self.provider)
        return self

    def check(self, methods: Sequence[str] = (), one_job: bool = False) -> None:
        """Finds now what would be wrong hours later: the model's sizes, splits, files, methods that cannot be.

        With `one_job` also a user that hands in several, for which the caller has no place.
        """
        config = self.config
        if one_job and self.recipe.attacker.jobs > 1:
            raise UserError(f"user.kind={config.user.kind} hands in several jobs: experiments/sweep.py runs them")
        source = config.model.source
        if source and not os.path.exists(source) and not is_hub_name(source):
            raise UserError(f"{source}: no such model: run experiments/fetch.py, or set model.source")
        if config.reinforce.adapter == OF_ALIGNMENT and not self._is_aligned_here:
            raise UserError(
                f"reinforce.adapter={OF_ALIGNMENT}: the model is aligned as it comes, and nothing says what alignment "
                "has added: set align.adapter, or train Reinforce"
            )
        for stage, folder in self._given.items():
            if not os.path.isdir(folder):
                raise UserError(f"{folder}: no such folder: correct {stage}.adapter, or leave it out to train one")
        look_up("eval.degenerate", config.eval.degenerate, DEGENERATE)
        judges = check_judges(config)
        check_sizes(config, self._spec, self.mesh)
        self.recipe.check()
        self._check_needs(methods)
        unknown = [attack.behavior for attack in self.recipe.attacks if attack.about is None]
        if unknown and (named := OF_TOPICS.intersection(judges)):
            raise UserError(
                f"data.attacks.path: {unknown[0][:60]!r} is about no invented topic, so the judge {named.pop()} cannot "
                "read its answers: set eval.judges to others"
            )

    def _check_needs(self, methods: Sequence[str]) -> None:
        """Refuses methods that lack a part of their `Case`."""
        align, buffer, reinforce = self.config.align, self.config.buffer, self.config.reinforce
        parts = {
            "refusals": (reinforce.refusals, "refusals (reinforce.refusals)"),
            "benign": (reinforce.benign, "benign rows (reinforce.benign)"),
            "harmful": (buffer.harmful, "harmful rows (buffer.harmful)"),
            "alignment": (align.refusals + align.benign, "rows of its alignment (align.refusals, align.benign)"),
            "direction": (self._is_aligned_here, "what alignment has added to it (align.refusals, align.benign)"),
        }
        lost = []
        for need, (given, what) in parts.items():
            names = [name for name in methods if need in METHODS[name].asks]
            if names and not given:
                lost.append(f"{', '.join(names)} without {what}")
        if lost:
            told = "; ".join(lost)
            raise UserError(f"this model cannot be defended by {told}: set these, or leave the methods out")

    # -- settings --------------------------------------------------------------------------------------------------

    def train(self, stage: str, **changes) -> TrainConfig:
        """The hyper-parameters of one of `TRAINED`, with some of them changed."""
        settings = self.config[stage].train.to_dict()
        settings = self.recipe.attacker.settings(settings, self.config.user.n) if stage == "user" else settings
        return TrainConfig(**settings | changes)

    def merge(self, **changes) -> MergeConfig:
        """The config's merge, with some settings changed; None changes nothing."""
        return MergeConfig(**self.config.merge.to_dict() | {k: v for k, v in changes.items() if v is not None})

    @property
    def user_run(self) -> dict:
        """How a user's stages are run."""
        return {"workdir": self.trained, "mesh": self.mesh, "probes": self.recipe.probes}

    # -- models ----------------------------------------------------------------------------------------------------

    @property
    def _spec(self) -> ModelSpec:
        """The raw model's, without its weights."""
        model = self.config.model
        if model.source:
            return _read_spec(*base_of(model.source, model.revision or None))
        if not model.spec:
            raise UserError("model.source is empty, and model.spec says no sizes of a model to train: set one of them")
        return ModelSpec(**model.spec)

    @functools.cached_property
    def raw(self) -> Model:
        """The model as it comes; where the config names none, a small one that is trained from scratch."""
        model = self.config.model
        source = model.source or self.provider / "pretrain" / "model"
        if not model.source:
            self._pretrain(source)
        settings = {name: model[name] for name in ("template", "dtype", "matmul_precision")}
        return load_model(source, mesh=self._model_mesh, revision=model.revision or None, **settings)

    def _pretrain(self, folder: pathlib.Path) -> None:
        config, spec, tokenizer = self.config.pretrain, self._spec, byte_tokenizer()
        params = init_params(spec, jax.random.key(config.train.seed))
        fresh = make_model(spec, params, tokenizer, "fresh", self.config.model.template)
        rows = self.recipe.pretraining_rows(config.rows)

        def save(params: dict) -> None:
            write_hf(folder, spec, jax.device_get(params), tokenizer)

        train_params("pretrain", fresh, rows, self.train("pretrain"), save, **self.provider_run)

    def _answer(self, prompts: Sequence[str]) -> dict[str, str]:
        """The raw model's own answers, each generated once."""
        store, length = self._store(self.provider), self.config.distill.answer_tokens
        answers = answer(self.raw, prompts, {"raw": None}, store, max_new_tokens=length, name="distill")
        return dict(zip(prompts, answers["raw"], strict=True))

    @property
    def _is_aligned_here(self) -> bool:
        """Whether there is an align stage, or an adapter in its place."""
        return bool(self.config.align.adapter or self.config.align.refusals + self.config.align.benign)

    @functools.cached_property
    def aligned(self) -> Model:
        """The aligned base, recorded in the provider's folder; the raw model where the config asks for no alignment."""
        rows = self.recipe.trained()
        if is_main():  # which rows the stages train on, so that a table can be repeated row for row
            if self.recipe.attacker.chooses():
                rows["user, to choose from"] = rows.pop("user")  # by a model that is not there yet
            ids = {stage: [f"{row.origin} {question_key(row)[:12]}" for row in part] for stage, part in rows.items()}
            write_json(self.workdir / "rows.json", ids)
        config, settings, model, align = self.config.align, self.config.model, self.raw, None
        if self._is_aligned_here:
            align = os.path.abspath(config.adapter) if config.adapter else "align/adapter"
            model = fold_adapter(self.raw, self.adapter("align"), f"{self.raw.name}-aligned")
        if is_main():
            source = settings.source
            base = (source if is_hub_name(source) else os.path.abspath(source)) if source else "pretrain/model"
            write_provider(self.provider, base, align, model, settings.dtype, settings.revision or None)
        return model

    def base(self, name: str) -> Model:
        """What a method stands on: "aligned", "raw", or the name of a defence that is an alignment of its own."""
        if name in ("aligned", "raw"):
            return self.aligned if name == "aligned" else self.raw
        if name not in self._bases:
            self._bases[name] = fold_adapter(self.raw, self.adapter(provided(name)), f"{self.raw.name}-{name}")
        return self._bases[name]

    @functools.cached_property
    def guarded(self) -> Model:
        """The aligned base with Buffer as its guard: what is handed on goes by way of it."""
        return guard(self.aligned, self.adapter("buffer"))

    @functools.cached_property
    def jobs(self) -> "list[Experiment]":
        """Those of this user, each trained and released apart: one, unless its attacker deals its rows out."""
        folders = job_folders(self.trained, self.recipe.attacker)
        if len(folders) == 1:
            return [self]
        _, jobs = self.aligned, [copy.copy(self) for _ in folders]  # which share models and the provider's files
        for i, (job, folder) in enumerate(zip(jobs, folders, strict=True)):
            job.recipe = copy.copy(self.recipe)
            job.recipe.user_rows = self.recipe.user_rows[i :: len(jobs)]
            job.trained = folder
            job._adapters, job._merged = {}, {}
        return jobs

    # -- adapters --------------------------------------------------------------------------------------------------

    @property
    def _given(self) -> dict[str, str]:
        """Folders of adapters made elsewhere, by the stage that each stands for."""
        given = {stage: folder for stage in ENTERED if (folder := self.config[stage].adapter)}
        return {s: folder for s, folder in given.items() if (s, folder) != ("reinforce", OF_ALIGNMENT)}

    def adapter(self, name: str) -> Adapter:
        """One of `methods.ADAPTERS`: trained, read back, or the one that the config gives for it."""
        if name not in self._adapters:
            given = self._given.get(name)
            adapter = self._adapters[name] = self._enter(name, given) if given else ADAPTERS[name](self)
            if name in RECORDED_ADAPTERS and is_main():
                record_adapter(self.provider, name, os.path.abspath(given) if given else f"{name}/adapter", adapter)
        return self._adapters[name]

    def _enter(self, stage: str, folder: str) -> Adapter:
        """The adapter that the config gives for a stage; another stage's is refused, by its roles or its numbers."""
        model = self.raw if stage == "align" else self.aligned
        adapter = load_adapter(folder, model.params, fingerprint=model.fingerprint, role=stage)
        if stage in ("reinforce", "user"):
            self.guarded.guard.refuse(folder, adapter)
        return adapter

    def defence(self, name: str) -> Defence:
        """One of `registry.DEFENCES`, with the config's settings."""
        return DEFENCES[name](**self.config.defences[name])

    def case(self, name: str, providing: bool = False) -> Case:
        """What one of `registry.DEFENCES` is given: when its provider's part is made, or when a user comes."""
        kind, recipe, config = DEFENCES[name], self.recipe, self.config
        ready = kind.provides() and not providing
        run = self.user_run
        if providing:  # apart by its settings
            key = key_of(config.defences[name].to_dict())[:8]
            run = self.provider_run | {"workdir": self.provider / f"{name}-{key}"}
        return Case(
            model=self.base(name if kind.aligns and ready else "aligned"),
            rows=recipe.user_rows,
            config=self.train("buffer" if providing else "user"),
            refusals=recipe.refusal_rows(config.reinforce.refusals, "reinforce"),
            benign=recipe.benign_rows(config.reinforce.benign),
            harmful=recipe.buffer_rows,
            direction=self.direction,
            raw=self.raw,
            alignment=recipe.guard_rows("align"),
            align_config=self.train("align"),
            provided=self.adapter(provided(name)) if ready else None,
            run=run,
        )

    def _appetite(self, rows: Sequence[Row], own: Sequence[Row]) -> Sequence[float]:
        """See `attackers.attacker.Job`: on the aligned base, as an attacker has it who knows all but Buffer."""
        beside = {}
        if own:
            name = f"own_buffer_{rows_fingerprint(own)[:8]}"  # a Buffer lies nowhere else than at the provider's
            run = {"provider": True, **self.provider_run}
            beside["buffer"] = train_adapter(name, "buffer", self.aligned, own, self.train("buffer"), **run)
        return gradient_norms(self.aligned, rows, self.train("user"), beside)

    def direction(self) -> Adapter:
        """What alignment has added to the raw model, as an adapter of the aligned base."""
        if not self._is_aligned_here:
            raise UserError("the model is aligned as it comes: this defence needs what alignment has added to it")
        return self.adapter("align").replace(base=self.aligned.fingerprint)

    def entered(self) -> dict[str, dict]:
        """For each stage that an adapter from elsewhere stands for: its folder, and what it was trained beside."""
        said = {folder: read_provenance(folder).get("extra", {}) for folder in self._given.values()}
        return {s: {"adapter": folder, "beside": said[folder].get("beside", [])} for s, folder in self._given.items()}

    def merged(self, user: str, reinforce: str = "reinforce", **merge) -> Adapter:
        """Reinforce merged into a user's adapter, as `merge_of` says."""
        settings = self.merge_of(user, reinforce, **merge)
        key = user, reinforce, settings
        if key not in self._merged:
            parts = self.adapter(user), self.adapter(reinforce)
            method.require_parts(self.aligned, *parts)
            self._merged[key] = qr_merge(*parts, settings)
        return self._merged[key]

    def merge_of(self, user: str, reinforce: str = "reinforce", **merge) -> MergeConfig:
        """The config's merge for a user's adapter, but for the settings that are given.

        Where the config calibrates, and no `reinforce_scale` is given, it is chosen by `calibration.calibrate`.
        """
        if not self.config.calibrate.harmful or "reinforce_scale" in merge:
            return self.merge(**merge)
        return MergeConfig(**self.calibration(user, reinforce, **merge)["merge"])

    @functools.cached_property
    def _calibration_judge(self) -> Judge | None:
        return calibration_judge(self.config, self._model_mesh)

    def calibration(self, user: str, reinforce: str = "reinforce", **merge) -> dict:
        """What `calibration.calibrate` saw and chose for a user's adapter, as JSON; kept in calibrations.jsonl."""
        settings = self.merge(**merge)
        harmful, benign = self.recipe.calibration_prompts
        adapters, prompts = (self.adapter(user), self.adapter(reinforce)), ([p.prompt for p in harmful], benign)
        kept, tokens = self._store(self.trained, "calibrations"), self.config.calibrate.answer_tokens
        judge = self._calibration_judge
        key = key_of(
            RULE, rules_version(), self.aligned.key, self.aligned.spelling, *map(lora.fingerprint, adapters),
            dataclasses.asdict(settings), *prompts, tokens, *([judge.name, judge.version] if judge else []),
        )  # fmt: skip
        if not all(kept.holds([key])):
            found = calibrate(
                self.aligned,
                *adapters,
                *prompts,
                settings,
                judge=judge,
                about={p.prompt: p for p in harmful},
                store=self._store(self.trained),
                base_store=self._store(self.provider),
                answer_tokens=tokens,
                batch_size=self.config.eval.batch_size,
            )
            tried = [
                {"scale": merge.scale, "reinforce_scale": merge.reinforce_scale, **seen._asdict()}
                for merge, seen in found.tried.items()
            ]
            chosen = dataclasses.asdict(found.merge)
            kept.add({key: {"user": user, "merge": chosen, "aligned": found.aligned._asdict(), "tried": tried}})
        return kept[key]

    def release(self) -> None:
        """Merges Reinforce into the user's adapter and writes what the user gets."""
        method.require_parts(self.guarded, self.adapter("user"), self.adapter("reinforce"))
        released = self.merged("user")
        if is_main():
            export_adapter(self.guarded, released, self.workdir / "released")

    def prepare(self) -> None:
        """Makes all that is the provider's, if it is not there yet."""
        self.recipe.prepare()
        _ = self.aligned, self.adapter("buffer"), self.adapter("reinforce")

    def hashes(self) -> dict[str, str]:
        """Fingerprints of the models, and of the adapters made so far."""
        models = {"raw": self.raw.fingerprint, "aligned": self.aligned.fingerprint}
        return models | {name: lora.fingerprint(adapter) for name, adapter in self._adapters.items()}

    # -- scores ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def suite(self) -> Suite:
        """The held-out prompts of the config's split."""
        return make_suite(self.config, self.recipe, self.raw, self._model_mesh)

    def score(self, cell: Cell) -> dict:
        """The scores of a cell (returned in process 0 alone); what is kept of its model is not found again.

        They are those of `scoring.suite.evaluate`, "geometry": norms and cosines of the adapters that it is made of and
        of Buffer, and "merge": the settings of its merge, if it has one. Prompts, answers and verdicts go to
        cells/NAME.jsonl. Raises `Stopped`, see `distributed.stop_if_asked`.
        """
        stop_if_asked()
        kind = METHODS[cell.method]
        jobs = [self] if kind.of_provider else self.jobs
        model, released = self.base(kind.base), [kind.adapter(job, cell.a) for job in jobs]
        merge = next((m for (*_, m), merged in jobs[0]._merged.items() if merged is released[0]), None)
        adapter = lora.stack(released) if len(released) > 1 else released[0]
        if adapter is not None and not kind.of_provider:
            adapter = self.recipe.attacker.after(adapter)
        model, adapter = as_scored(self.config, model, adapter, cell.name)
        suite = dataclasses.replace(self.suite, instruction=kind.instruction(self))
        home = self.provider if kind.of_provider else self.trained
        files = {"store": "answers", "verdicts": "verdicts", "forced": "forced"}
        kept = {name: self._store(home, file) for name, file in files.items()}
        records = self.workdir / "cells" / f"{cell.name}.jsonl"
        scores = evaluate(model, suite, adapter, name=cell.name, records=records, **kept)
        parts = dict.fromkeys((*kind.needs, "buffer")) if kind.needs else ()
        scores |= {"geometry": geometry({name: jobs[0].adapter(name) for name in parts})}
        scores |= {"suite": self.suite.key[:16]} | ({"merge": dataclasses.asdict(merge)} if merge else {})
        refused = read_score(scores.get("task_refused")).score or 0.0
        if is_main() and cell.method == "aligned" and refused > _REFUSED:
            logging.warning(
                "the aligned base refuses %.0f %% of the task's prompts: what a user learns beside Buffer loses "
                "by that when Buffer is taken out; align it on benign prompts of such kinds too",
                100 * refused,
            )
        return scores if is_main() else {}

    def _store(self, folder: pathlib.Path, of: str = "answers") -> Store:
        """The answers, verdicts or scores that are kept in a folder."""
        file = folder / f"{of}.jsonl"
        if file not in self._stores:
            self._stores[file] = Store(file)
        return self._stores[file]
