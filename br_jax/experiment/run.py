"""One user's experiment: models, adapters and scores of one config in one folder, each made or read back at first use.

On several processes every stage runs on the devices of all of them; files are process 0's work, which the others read.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from br_jax import method
from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.adapters.peft import load_adapter, read_provenance
from br_jax.calibration import RULE, calibrate
from br_jax.core.errors import UserError
from br_jax.core.hosts import is_main
from br_jax.core.io import make_private, write_json
from br_jax.core.mesh import make_mesh
from br_jax.core.records import key_of
from br_jax.core.store import Store
from br_jax.data.rows import Row
from br_jax.data.selection import refusing_first
from br_jax.defences.defence import Case, Defence
from br_jax.defences.registry import DEFENCES
from br_jax.experiment.methods import (
    ABLATIONS,
    DIRECTION,
    METHODS,
    OF_ALIGNMENT,
    OF_PROVIDER,
    PROVIDED,
    PROVIDER_STAGES,
    TRAININGS,
)
from br_jax.experiment.recipe import PaperRecipe, TopicRecipe, question_key
from br_jax.experiment.settings import Settings, check_sizes, settle
from br_jax.experiment.suite import calibration_judge, check_scoring, make_suite
from br_jax.inference.generate import answer
from br_jax.models.decoder import init_params
from br_jax.models.io.hf import write_hf
from br_jax.models.io.load import is_hub_name, read_spec
from br_jax.models.model import Model, fold_adapter, guard, make_model
from br_jax.models.spec import ModelSpec
from br_jax.models.tokenizer import byte_tokenizer
from br_jax.provider import RECORDED_ADAPTERS, base_of, export_adapter, load_model, record_adapter, write_provider
from br_jax.scoring.suite import Suite, rules_version
from br_jax.training.batching import gradient_norms
from br_jax.training.run import keep_adapter, rows_fingerprint, train_adapter, train_params

_cached_spec = functools.cache(read_spec)  # for all runs of a sweep: the header of a GGUF file takes seconds


def job_folders(trained: pathlib.Path, jobs: int) -> list[pathlib.Path]:
    """Where each of a user's jobs is trained, in the folder of what is trained on its rows."""
    return [trained] if jobs == 1 else [trained / f"job{i}" for i in range(jobs)]


class Experiment:
    """The models, rows and scores of one config in one workdir. Nothing is written before `begin`.

    Args:
        config: see configs/base.py, or the settings that `settle` made of one; a `UserError` where it is wrong.
        workdir: the same config comes back to the same workdir, another one is refused.
    """

    def __init__(self, config: ConfigDict | Settings, workdir: str | os.PathLike):
        self.settings = s = settle(config)
        self.workdir = pathlib.Path(workdir)
        self.provider = pathlib.Path(s.provider) if s.provider else self.workdir / "provider"
        self.trained = pathlib.Path(s.user.folder) if s.user.folder else self.workdir
        self.jobs = job_folders(self.trained, s.attacker.jobs)
        self.mesh = make_mesh(**dataclasses.asdict(s.mesh))
        self._model_mesh = self.mesh if self.mesh.size > 1 else None  # None is the one device that there is
        if s.data.material == "paper":
            self.recipe = PaperRecipe(s, self._score_rows)
        else:
            self.recipe = TopicRecipe(s, self._score_rows, self._answer)
        self.provider_run = {"workdir": self.provider, "mesh": self.mesh}  # how the provider's stages are run
        self._kept: dict[tuple, Any] = {}
        folders = {stage: getattr(s, stage).adapter for stage in (*PROVIDER_STAGES, "user")}
        # Folders of adapters made elsewhere, by the stage that each stands for.
        self._given = {stage: folder for stage, folder in folders.items() if folder not in ("", OF_ALIGNMENT)}

    def _keep(self, make: Callable[[], Any], *key: Any) -> Any:
        """An artifact by its key, made at first use."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def begin(self) -> "Experiment":
        """Makes the provider's folder, for its owner alone; nothing is written before."""
        if is_main():
            make_private(self.provider)
        return self

    def check(self, methods: Sequence[str] = (), one_job: bool = False) -> None:
        """Finds now what would be wrong hours later: the model's sizes, splits, files, methods that cannot be.

        With `one_job` also a user that hands in several, for which the caller has no place.
        """
        s = self.settings
        if one_job and len(self.jobs) > 1:
            raise UserError(f"user.kind={s.user.kind} hands in several jobs: experiments/sweep.py runs them")
        source = s.model.source
        if source and not os.path.exists(source) and not is_hub_name(source):
            raise UserError(f"{source}: no such model: run experiments/fetch.py, or set model.source")
        if s.reinforce.adapter == OF_ALIGNMENT and not s.aligns:
            raise UserError(
                f"reinforce.adapter={OF_ALIGNMENT}: the model is aligned as it comes, and nothing says what alignment "
                "has added: set align.adapter, or train Reinforce"
            )
        for stage, folder in self._given.items():
            if not os.path.isdir(folder):
                raise UserError(f"{folder}: no such folder: correct {stage}.adapter, or leave it out to train one")
        check_scoring(s, self.recipe)
        check_sizes(s, self._spec, self.mesh)
        self.recipe.check()
        parts = {  # that a method may lack
            "refusals": (s.reinforce.refusals, "refusals (reinforce.refusals)"),
            "benign": (s.reinforce.benign, "benign rows (reinforce.benign)"),
            "harmful": (s.buffer.harmful, "harmful rows (buffer.harmful)"),
            "alignment": (s.align.refusals + s.align.benign, "rows of its alignment (align.refusals, align.benign)"),
            DIRECTION: (s.aligns, "what alignment has added to it (align.refusals, align.benign)"),
        }
        wanting = {need: [name for name in methods if need in METHODS[name].requires] for need in parts}
        lost = [f"{', '.join(wanting[need])} without {what}" for need, (given, what) in parts.items()
                if wanting[need] and not given]  # fmt: skip
        if lost:
            raise UserError(f"this model cannot be defended by {'; '.join(lost)}: set these, or leave the methods out")

    # -- models ----------------------------------------------------------------------------------------------------

    @property
    def _spec(self) -> ModelSpec:
        """The raw model's, without its weights."""
        model = self.settings.model
        if model.source:
            return _cached_spec(*base_of(model.source, model.revision or None))
        if not model.spec:
            raise UserError("model.source is empty, and model.spec says no sizes of a model to train: set one of them")
        return ModelSpec(**model.spec)

    def model(self, name: str) -> Model:
        """What a method stands on: "raw", "aligned", or the name of a defence that is an alignment of its own.

        The aligned base is recorded in the provider's folder, and its rows in rows.json; it is the raw model where the
        config asks for no alignment.
        """
        makers = {"raw": self._make_raw, "aligned": self._make_aligned}
        return self._keep(makers.get(name) or (lambda: self._aligned_by(PROVIDED[name], name)), "model", name)

    raw = property(lambda self: self.model("raw"))
    aligned = property(lambda self: self.model("aligned"))

    def _make_raw(self) -> Model:
        """The model as it comes; where the config names none, a small one that is trained from scratch."""
        model = self.settings.model
        source = model.source or self.provider / "pretrain" / "model"
        if not model.source:
            spec, tokenizer, train = self._spec, byte_tokenizer(), self.settings.train("pretrain")
            fresh = make_model(spec, init_params(spec, train.seed), tokenizer, "fresh", model.template)
            rows = self.recipe.pretraining_rows(self.settings.pretrain.rows)

            def save(params: dict) -> None:
                write_hf(source, spec, jax.device_get(params), tokenizer)

            train_params("pretrain", fresh, rows, train, save, **self.provider_run)
        settings = {name: getattr(model, name) for name in ("template", "dtype", "matmul_precision")}
        return load_model(source, mesh=self._model_mesh, revision=model.revision or None, **settings)

    def _make_aligned(self) -> Model:
        s, rows = self.settings, self.recipe.trained()
        if is_main():  # which rows the stages train on, so that a table can be repeated row for row
            if s.attacker.chooses():
                rows["user, to choose from"] = rows.pop("user")  # by a model that is not there yet
            ids = {stage: [f"{row.origin} {question_key(row)[:12]}" for row in part] for stage, part in rows.items()}
            write_json(self.workdir / "rows.json", ids)
        model, align, source = self.raw, None, s.model.source
        if s.aligns:
            align = os.path.abspath(s.align.adapter) if s.align.adapter else "align/adapter"
            model = self._aligned_by("align", "aligned")
        if is_main():
            base = (source if is_hub_name(source) else os.path.abspath(source)) if source else "pretrain/model"
            write_provider(self.provider, base, align, model, s.model.dtype, s.model.revision or None)
        return model

    def _aligned_by(self, adapter: str, name: str) -> Model:
        return fold_adapter(self.raw, self.adapter(adapter), f"{self.raw.name}-{name}")

    def _answer(self, prompts: Sequence[str]) -> dict[str, str]:
        """The raw model's own answers, each generated once."""
        store, length = self.store(self.provider), self.settings.distill.answer_tokens
        answers = answer(self.raw, prompts, {"raw": None}, store, max_new_tokens=length, name="distill")
        return dict(zip(prompts, answers["raw"], strict=True))

    @functools.cached_property
    def guarded(self) -> Model:
        """The aligned base with Buffer as its guard: what is handed on goes by way of it."""
        return guard(self.aligned, self.adapter("buffer"))

    def prepare(self) -> None:
        """Makes all that is the provider's, if it is not there yet."""
        self.recipe.prepare()
        _ = self.aligned, self.adapter("buffer"), self.adapter("reinforce")

    # -- adapters --------------------------------------------------------------------------------------------------

    def adapter(self, name: str, job: int = 0) -> Adapter:
        """An adapter of `methods`: trained, read back, or the one that the config gives for it.

        Args:
            name: of `TRAININGS` or `ABLATIONS`, of a defence that trains one or `PROVIDED` for one, or `DIRECTION`.
            job: of those that the user hands in, whose rows it is trained on; the provider's adapters have none.
        """
        job = 0 if name in OF_PROVIDER else job
        return self._keep(lambda: self._make_adapter(name, job), "adapter", name, job)

    def _make_adapter(self, name: str, job: int) -> Adapter:
        given = self._given.get(name)
        if given:  # another stage's is refused, by its roles or its numbers
            model = self.model("raw" if name == "align" else "aligned")
            adapter = load_adapter(given, model.params, fingerprint=model.fingerprint, role=name)
            if name in ("reinforce", "user"):
                self.guarded.guard.refuse(given, adapter)
        elif name == DIRECTION:
            adapter = self.direction().replace(roles=("reinforce",))
        elif name in DEFENCES:
            adapter = self.defence(name).train(self.case(name, job), name)
        elif name in PROVIDED.values():
            defence = name.removesuffix("_provided")
            adapter = self.defence(defence).provide(self.case(defence, providing=True), name)
        else:
            adapter = self._train(name, job)
        if name in RECORDED_ADAPTERS and is_main():
            record_adapter(self.provider, name, os.path.abspath(given) if given else f"{name}/adapter", adapter)
        return adapter

    def _train(self, name: str, job: int) -> Adapter:
        """One of `TRAININGS` or `ABLATIONS`, on its stage's rows."""
        recipe, s, run = self.recipe, self.settings, self.provider_run
        stage, buffer, changes = (TRAININGS | ABLATIONS)[name]
        config = s.train(stage, **changes)
        if stage == "align":
            return train_adapter(name, stage, self.raw, recipe.guard_rows(stage), config, provider=True, **run)
        if stage == "buffer":
            rows = recipe.buffer_rows
            if s.buffer.refused:
                rows = refusing_first(rows, recipe.refusal_rows(len(rows), "buffer"), s.buffer.refused)
            return method.train_buffer(self.aligned, rows, config, name=name, **run)
        if stage == "reinforce":
            if name == stage and s.reinforce.adapter == OF_ALIGNMENT:
                return keep_adapter(name, stage, self.aligned, self.adapter(DIRECTION), self.provider)
            rows = recipe.refusal_rows(s.reinforce.refusals, stage), recipe.benign_rows(s.reinforce.benign)
            return method.train_reinforce(self.aligned, self.adapter(buffer), *rows, config, name=name, **run)
        beside = {"buffer": self.adapter(buffer)} if buffer else {"undefended": True}
        return method.train_user(self.aligned, self.user_rows(job), config, **beside, name=name, **self._user_run(job))

    def user_rows(self, job: int) -> Sequence[Row]:
        """Those of one of the user's jobs."""
        return self.recipe.user_rows[job :: len(self.jobs)]

    def _user_run(self, job: int) -> dict[str, Any]:
        return {"workdir": self.jobs[job], "mesh": self.mesh, "probes": self.recipe.probes}

    def defence(self, name: str) -> Defence:
        """One of `registry.DEFENCES`, with the config's settings."""
        return getattr(self.settings.defences, name)

    def case(self, name: str, job: int = 0, providing: bool = False) -> Case:
        """What one of `registry.DEFENCES` is given: when its provider's part is made, or when a user comes."""
        kind, recipe, s = DEFENCES[name], self.recipe, self.settings
        ready, run = kind.provides() and not providing, self._user_run(job)
        if providing:  # apart by its settings
            key = key_of(dataclasses.asdict(self.defence(name)))[:8]
            run = self.provider_run | {"workdir": self.provider / f"{name}-{key}"}
        return Case(
            model=self.model(name if kind.aligns and ready else "aligned"),
            rows=self.user_rows(job),
            config=s.train("buffer" if providing else "user"),
            refusals=recipe.refusal_rows(s.reinforce.refusals, "reinforce"),
            benign=recipe.benign_rows(s.reinforce.benign),
            harmful=recipe.buffer_rows,
            direction=self.direction,
            raw=self.raw,
            alignment=recipe.guard_rows("align"),
            align_config=s.train("align"),
            provided=self.adapter(PROVIDED[name]) if ready else None,
            run=run,
        )

    def _score_rows(self, rows: Sequence[Row], own: Sequence[Row]) -> Sequence[float]:
        """See `attackers.attacker.Sources`: on the aligned base, as an attacker has it who knows all but Buffer."""
        frozen, model = {}, self.aligned
        if own:
            name = f"own_buffer_{rows_fingerprint(own)[:8]}"  # a Buffer lies nowhere else than at the provider's
            config, run = self.settings.train("buffer"), self.provider_run | {"provider": True}
            frozen["buffer"] = train_adapter(name, "buffer", model, own, config, **run)
        return gradient_norms(model, rows, self.settings.train("user"), frozen)

    def direction(self) -> Adapter:
        """What alignment has added to the raw model, as an adapter of the aligned base."""
        if not self.settings.aligns:
            raise UserError("the model is aligned as it comes: this defence needs what alignment has added to it")
        return self.adapter("align").replace(base=self.aligned.fingerprint)

    def entered(self) -> dict[str, dict]:
        """For each stage that an adapter from elsewhere stands for: its folder, and what it was trained beside."""
        found = {stage: read_provenance(folder).get("extra", {}) for stage, folder in self._given.items()}
        return {s: {"adapter": self._given[s], "beside": extra.get("beside", [])} for s, extra in found.items()}

    # -- merges and scores -----------------------------------------------------------------------------------------

    def merge_of(self, user: str, reinforce: str = "reinforce", job: int = 0, **changes: float | None) -> MergeConfig:
        """The config's merge for a user's adapter, but for the settings that are given (None gives none).

        Where the config calibrates, and no `reinforce_scale` is given, it is chosen by `calibration.calibrate`.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        merge = dataclasses.replace(self.settings.merge, **given)
        if not self.settings.calibrate.harmful or "reinforce_scale" in given:
            return merge
        return MergeConfig(**self.calibration(user, reinforce, merge, job)["merge"])

    def calibration(
        self, user: str, reinforce: str = "reinforce", merge: MergeConfig | None = None, job: int = 0
    ) -> dict:
        """What `calibration.calibrate` saw and chose for a user's adapter, as JSON; kept in calibrations.jsonl."""
        merge, model, s = merge or self.settings.merge, self.aligned, self.settings
        harmful, benign = self.recipe.calibration_prompts
        adapters, prompts = (self.adapter(user, job), self.adapter(reinforce)), ([p.prompt for p in harmful], benign)
        kept, tokens = self.store(self.jobs[job], "calibrations"), s.calibrate.answer_tokens
        judge = self._keep(lambda: calibration_judge(s, self._model_mesh), "judge")
        key = key_of(
            RULE, rules_version(), model.key, model.spelling, *map(lora.fingerprint, adapters),
            dataclasses.asdict(merge), *prompts, tokens, *([judge.name, judge.version] if judge else []),
        )  # fmt: skip
        if not all(kept.holds([key])):
            found = calibrate(
                model,
                *adapters,
                *prompts,
                merge,
                judge=judge,
                about={p.prompt: p for p in harmful},
                store=self.store(self.jobs[job]),
                base_store=self.store(self.provider),
                answer_tokens=tokens,
                batch_size=s.eval.batch_size,
            )
            tried = [
                {"scale": each.scale, "reinforce_scale": each.reinforce_scale, **seen._asdict()}
                for each, seen in found.tried.items()
            ]
            chosen = dataclasses.asdict(found.merge)
            kept.add({key: {"user": user, "merge": chosen, "aligned": found.aligned._asdict(), "tried": tried}})
        return kept[key]

    def merged(self, user: str, reinforce: str, merge: MergeConfig, job: int = 0) -> Adapter:
        """Reinforce merged into a user's adapter."""

        def make() -> Adapter:
            parts = self.adapter(user, job), self.adapter(reinforce)
            method.require_parts(self.aligned, *parts)
            return qr_merge(*parts, merge)

        return self._keep(make, "merged", user, reinforce, merge, job)

    def release(self) -> None:
        """Merges Reinforce into the user's adapter and writes what the user gets."""
        method.require_parts(self.guarded, self.adapter("user"), self.adapter("reinforce"))
        released = self.merged("user", "reinforce", self.merge_of("user"))
        if is_main():
            export_adapter(self.guarded, released, self.workdir / "released")

    def hashes(self) -> dict[str, str]:
        """Fingerprints of the models, and of the adapters made so far."""
        models = {name: self.model(name).fingerprint for name in ("raw", "aligned")}
        adapters = {key[1]: made for key, made in self._kept.items() if key[0] == "adapter" and not key[2]}
        return models | {name: lora.fingerprint(adapter) for name, adapter in adapters.items()}

    @functools.cached_property
    def suite(self) -> Suite:
        """The held-out prompts of the config's split."""
        return make_suite(self.settings, self.recipe, self.raw, self._model_mesh)

    def as_scored(self, model: Model, adapter: Adapter | None, name: str) -> tuple[Model, Adapter | None]:
        """What is scored, a model and an adapter beside it: where the config folds, none but a Buffer stays beside."""
        if not self.settings.eval.fold or adapter is None or "buffer" in adapter.roles:
            return model, adapter
        return fold_adapter(model, adapter, f"{model.name}-{name}"), None

    def store(self, folder: pathlib.Path, of: str = "answers") -> Store:
        """The answers, verdicts or scores that are kept in a folder."""
        file = folder / f"{of}.jsonl"
        return self._keep(lambda: Store(file), "store", file)
