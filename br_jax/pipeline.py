"""The whole experiment: from a raw model and a config to nine scored models and a report.

Stages, in order: pretrain (a model from scratch, where the config names no other), distill (the raw model answers the
prompts that others train on), align, buffer, reinforce, sft, user, release, evaluate, report. Each leaves its result in
the workdir or the provider's folder and is read back when it is there
already; the functions of the public API do the work.

On several processes every stage runs on the devices of all of them; files are process 0's work, which the others read.
"""

import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import time
from collections.abc import Sequence

import jax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from br_jax import method
from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import qr_merge
from br_jax.adapters.peft import load_adapter, read_provenance, save_adapter
from br_jax.distributed import agree, is_main, stop_if_asked
from br_jax.errors import UserError
from br_jax.evaluation.distill import self_answers
from br_jax.evaluation.evaluate import Suite, answer_suite, evaluate
from br_jax.evaluation.judges.base import Judge
from br_jax.evaluation.judges.registry import get_judge, require_judge
from br_jax.evaluation.report import write_report
from br_jax.evaluation.scores import gates, read_score
from br_jax.evaluation.store import Store
from br_jax.models.decoder import init_params
from br_jax.models.hf import write_hf
from br_jax.models.hub import is_hub_name
from br_jax.models.load import PROVIDER_FILE, fold_adapter, load_model
from br_jax.models.model import Model, make_model
from br_jax.models.spec import ModelSpec
from br_jax.models.tokenizer import byte_tokenizer
from br_jax.recipes import make_recipe
from br_jax.recipes.base import question_key
from br_jax.sharding import make_mesh
from br_jax.training.config import TrainConfig
from br_jax.training.run import adapter_fingerprint, make_private, train_params, write_json

STAGES = ("pretrain", "distill", "align", "buffer", "reinforce", "sft", "user", "release", "evaluate", "report")
TRAINED = ("pretrain", "align", "buffer", "reinforce", "user")
ENTERED = ("align", "buffer", "reinforce", "user")  # stages that an adapter made elsewhere can take the place of
OF_PROVIDER = ("raw", "aligned", "base_buffer", "reinforce_alone")  # no user in it: scored once for all users
_REFUSED = 0.2  # share of the task's prompts beyond which a refusing base is said
PACKAGES = ("br_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def run_pipeline(
    config: ConfigDict, workdir: str | os.PathLike, stages: Sequence[str] = STAGES, command: str = ""
) -> dict:
    """Runs stages of an experiment; what is finished is read back, what was stopped goes on.

    Args:
        config: see configs/base.py.
        workdir: made if absent; the same config comes back to the same workdir, another one is refused.
        stages: which to run; what they need from earlier ones is read back, or made.
        command: recorded in the report.

    Returns:
        The contents of results.json (empty when "evaluate" is not among the stages, and in all processes but 0).

    Raises:
        UserError: a wrong stage or setting, missing files, a workdir of another run.
        Stopped: SIGTERM came, see `training.loop.fit`.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise UserError(f"stage {unknown[0]!r}: {lora.near_names(unknown[0], STAGES)}")
    start = time.perf_counter()
    experiment = Experiment(config, workdir)
    experiment.check()
    for stage in STAGES[: STAGES.index("evaluate")]:
        if stage in stages:
            getattr(experiment, stage)()
    results = {}
    if "evaluate" in stages and (results := experiment.evaluate()):
        results |= {"command": command, "wall_seconds": time.perf_counter() - start}
        write_json(experiment.workdir / "results.json", results)
    if "report" in stages and is_main():
        write_report(experiment.workdir)
    return results


class Experiment:
    """The stages of one config in one workdir; every result is computed or read back at first use, and kept."""

    def __init__(self, config: ConfigDict, workdir: str | os.PathLike):
        self.config = config
        self.workdir = pathlib.Path(workdir)
        self.provider = pathlib.Path(config.provider) if config.provider else self.workdir / "provider"
        self.mesh = make_mesh(**config.mesh)
        self.recipe = make_recipe(config, self._answer)
        self._stores: dict[pathlib.Path, Store] = {}
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            make_private(self.provider)
        except OSError as error:
            raise UserError(
                f"{error.filename}: cannot be written ({error.strerror}): choose another workdir"
            ) from error

    def check(self) -> None:
        """Finds now what would be wrong hours later: settings, splits, files."""
        config = self.config
        for stage in TRAINED:
            TrainConfig(**config[stage].train)
        source = config.model.source
        if source and not os.path.exists(source) and not is_hub_name(source):
            raise UserError(f"{source}: no such model: run experiments/fetch.py, or set model.source")
        for stage in ENTERED:
            if (folder := config[stage].adapter) and not os.path.isdir(folder):
                raise UserError(f"{folder}: no such folder: correct {stage}.adapter, or leave it out to train one")
        judges = [name for name, _ in self._judge_names()]
        for name in judges:
            require_judge(name)
        self.recipe.check()
        unknown = [attack.behavior for attack in self.recipe.attacks if attack.about is None]
        if unknown and "topic" in judges:
            raise UserError(
                f"data.attacks.path: {unknown[0][:60]!r} is about no invented topic, so the judge topic cannot read "
                "its answers: set eval.judges to others"
            )

    # -- the provider's stages -------------------------------------------------------------------------------------

    @functools.cached_property
    def raw(self) -> Model:
        """The model as it comes, or as `pretrain` makes it."""
        model = self.config.model
        source = model.source or self.provider / "pretrain" / "model"
        if not model.source:
            self._pretrain(source)
        return load_model(
            source,
            template=model.template,
            dtype=model.dtype,
            mesh=self._model_mesh,
            revision=model.revision or None,
            cache=model.cache or None,
        )

    @property
    def _model_mesh(self) -> Mesh | None:
        """Where models are laid; None is the one device that there is."""
        return self.mesh if self.mesh.size > 1 else None

    def pretrain(self) -> None:
        """Trains a small model from scratch, unless the config names one."""
        _ = self.raw

    def _pretrain(self, folder: pathlib.Path) -> None:
        config, spec = self.config.pretrain, ModelSpec(**self.config.model.spec)
        tokenizer = byte_tokenizer()
        params = init_params(spec, jax.random.key(config.train.seed))
        fresh = make_model(spec, params, tokenizer, "fresh", self.config.model.template)
        rows = self.recipe.pretraining_rows(config.rows)
        save = functools.partial(_save_model, folder, spec, tokenizer)
        train_params("pretrain", fresh, rows, TrainConfig(**config.train), save, workdir=self.provider, mesh=self.mesh)

    def _answer(self, prompts: Sequence[str]) -> dict[str, str]:
        """The raw model's own answers."""
        length = self.config.distill.answer_tokens
        return self_answers(self.raw, prompts, self._store(self.provider), max_new_tokens=length)

    def distill(self) -> None:
        """Has the raw model answer."""
        self.recipe.prepare()

    def _record_rows(self) -> None:
        """Writes which rows the stages train on, so that a table can be repeated row for row."""
        rows = self.recipe.trained()
        if is_main():
            ids = {stage: [f"{row.origin} {question_key(row)[:12]}" for row in part] for stage, part in rows.items()}
            write_json(self.workdir / "rows.json", ids)

    @functools.cached_property
    def aligned(self) -> Model:
        """The aligned base; the raw model itself where the config asks for no alignment."""
        self._record_rows()
        config, adapter, model = self.config.align, None, self.raw
        if config.adapter:
            adapter = self._enter("align", self.raw)
        elif config.refusals + config.benign:
            rows = self.recipe.refusal_rows(config.refusals, "align"), self.recipe.benign_rows(config.benign)
            adapter = method.train_align(self.raw, *rows, TrainConfig(**config.train), **self._provider_run)
        if adapter:
            model = fold_adapter(self.raw, adapter, f"{self.raw.name}-aligned")
        source = self.config.model.source
        record = {
            "base": (source if is_hub_name(source) else os.path.abspath(source)) if source else "pretrain/model",
            "revision": self.config.model.revision or None,
            "align": (os.path.abspath(config.adapter) if config.adapter else "align/adapter") if adapter else None,
            "template": model.template,
            "dtype": self.config.model.dtype,
            "fingerprint": model.fingerprint,
        }
        if is_main():
            write_json(self.provider / PROVIDER_FILE, record)
        return model

    def align(self) -> None:
        """Makes the aligned base and the provider's record of it."""
        _ = self.aligned

    @functools.cached_property
    def buffer_adapter(self) -> Adapter:
        if self.config.buffer.adapter:
            return self._enter("buffer", self.aligned)
        train = TrainConfig(**self.config.buffer.train)
        return method.train_buffer(self.aligned, self.recipe.buffer_rows, train, **self._provider_run)

    def buffer(self) -> None:
        """Trains BufferLoRA."""
        _ = self.buffer_adapter

    @functools.cached_property
    def reinforce_adapter(self) -> Adapter:
        config = self.config.reinforce
        if config.adapter:
            return self._enter("reinforce", self.aligned)
        rows = self.recipe.refusal_rows(config.refusals, "reinforce"), self.recipe.benign_rows(config.benign)
        train = TrainConfig(**config.train)
        return method.train_reinforce(self.aligned, self.buffer_adapter, *rows, train, **self._provider_run)

    def reinforce(self) -> None:
        """Trains ReinforceLoRA."""
        _ = self.reinforce_adapter

    def prepare(self) -> None:
        """Makes all that is the provider's, if it is not there yet."""
        self.recipe.prepare()
        _ = self.aligned, self.buffer_adapter, self.reinforce_adapter

    # -- the user's stages -----------------------------------------------------------------------------------------

    @functools.cached_property
    def sft_adapter(self) -> Adapter:
        return self._train_user(None)

    def sft(self) -> None:
        """Trains the user's adapter without a defence."""
        _ = self.sft_adapter

    @functools.cached_property
    def user_adapter(self) -> Adapter:
        return self._enter("user", self.aligned) if self.config.user.adapter else self._train_user(self.buffer_adapter)

    def user(self) -> None:
        """Trains the user's adapter with Buffer attached."""
        _ = self.user_adapter

    def _train_user(self, buffer: Adapter | None) -> Adapter:
        config = self.config.user
        return method.train_user(
            self.aligned,
            self.recipe.user_rows,
            TrainConfig(**config.train),
            buffer=buffer,
            workdir=self.workdir,
            mesh=self.mesh,
            probes=self.recipe.probes,
        )

    def _enter(self, stage: str, model: Model) -> Adapter:
        """The adapter that the config gives for a stage; one that says that it is another's is refused."""
        folder = self.config[stage].adapter
        adapter = load_adapter(folder, model.params, fingerprint=model.fingerprint, role=stage)
        if adapter.roles != (stage,):
            raise UserError(f"{folder}: made of {', '.join(adapter.roles)}: {stage}.adapter must be a {stage} adapter")
        return adapter

    def _entered(self) -> dict[str, dict]:
        """For each stage that an adapter from elsewhere stands for: its folder, and what it was trained beside."""
        entered = {}
        for stage in ENTERED:
            if folder := self.config[stage].adapter:
                said = read_provenance(folder)
                beside = said.get("extra", {}).get("beside", [])
                entered[stage] = {"adapter": folder, "beside": beside}
        return entered

    @functools.cached_property
    def _released(self) -> Adapter:
        adapter = method.release(self.aligned, self.user_adapter, self.reinforce_adapter, **self.config.merge)
        if is_main():
            folder = self.workdir / "released"
            save_adapter(folder, adapter, base_name=self.aligned.name, fingerprint=self.aligned.fingerprint)
        return adapter

    def release(self) -> None:
        """Merges Reinforce into the user's adapter and writes what the user gets."""
        _ = self._released

    @property
    def _provider_run(self) -> dict:
        return {"workdir": self.provider, "mesh": self.mesh}

    # -- evaluation ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def suite(self) -> Suite:
        """The held-out prompts of the config's split."""
        config, recipe = self.config.eval, self.recipe
        return Suite(
            topic=recipe.harmful_prompts,
            judges=self._judges(),
            attacks=recipe.attacks,
            task_rows=recipe.scored_task_rows,
            rule=recipe.rule,
            benign=recipe.benign_prompts,
            health=recipe.health_rows,
            answer_tokens=config.answer_tokens,
            task_tokens=config.task_tokens,
            batch_size=config.batch_size,
        )

    def _judges(self) -> list[Judge]:
        # FSDP alone: a judge's vocabulary may be one that the experiment's tensor axis does not divide.
        settings, mesh = self.config.judges, self._model_mesh and make_mesh(data=1, fsdp=-1)
        return [get_judge(name, mesh, **{**settings.get(name, {}), **given}) for name, given in self._judge_names()]

    def _judge_names(self) -> list[tuple[str, dict]]:
        """The judges' names, and what of their settings is said with them: classifier@2048 has another max_length."""
        entries = [entry.strip().partition("@") for entry in self.config.eval.judges.split(",")]
        return [(name, {"max_length": int(length)} if length.isdecimal() else {}) for name, _, length in entries]

    def variants(self) -> dict[str, tuple[Model, Adapter | None]]:
        """The nine models of the report."""
        merge = self.config.merge.to_dict()
        adapters = {"user": self.user_adapter, "buffer": self.buffer_adapter}
        return {
            "raw": (self.raw, None),
            "aligned": (self.aligned, None),
            "base_buffer": (self.aligned, self.buffer_adapter),
            "sft": (self.aligned, self.sft_adapter),
            "buffer_on": (self.aligned, lora.stack(adapters)),
            "buffer_off": (self.aligned, lora.stack(method.detach(adapters, "buffer"))),
            "reinforce_alone": (self.aligned, self.reinforce_adapter),
            "naive_merge": (
                self.aligned,
                method.release(self.aligned, self.user_adapter, self.reinforce_adapter, **merge | {"a": 0.0}),
            ),
            "qr_merge": (self.aligned, self._released),
        }

    def evaluate(self) -> dict:
        """Scores the nine models (returned in process 0 alone); those scored before on this suite are read back."""
        models, variants = {}, self.variants()
        if (together := self.config.eval.together) > 1:
            users = {name: adapter for name, (_, adapter) in variants.items() if name not in OF_PROVIDER}
            answer_suite(self.aligned, self.suite, users, self._store(self.workdir), together=together)
        for name, (model, adapter) in variants.items():
            models[name] = self.score(name, model, adapter)
        if not is_main():
            return {}
        _, merge = qr_merge(self.user_adapter, self.reinforce_adapter, **self.config.merge)
        return {
            "models": models,
            "merge": merge,
            "entered": self._entered(),
            "gates": gates(models, self.config.user.harmful_share),
            "seeds": {
                "data": self.config.seed,
                **{s: self.config[s].train.seed for s in ("align", "buffer", "reinforce", "user")},
            },
            "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
            "hashes": {"raw": self.raw.fingerprint, "aligned": self.aligned.fingerprint, **self._adapter_hashes()},
            "devices": [str(device) for device in jax.devices()],
            "config": self.config.to_dict(),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def score(self, name: str, model: Model, adapter: Adapter | None = None) -> dict:
        """Scores a model on the suite (returned in process 0 alone); the same one's on the same suite are read back.

        Raises:
            Stopped: see `distributed.stop_if_asked`.
        """
        stop_if_asked()
        home = self.provider if name in OF_PROVIDER else self.workdir
        key = f"{model.fingerprint} {adapter_fingerprint(adapter) if adapter else ''} {self.suite.key}"
        file = home / "eval" / f"{name}.json"
        known = json.loads(file.read_text()) if is_main() and file.exists() else {}
        if agree(known.get("key") == key):
            return known.get("scores", {})
        records = file.with_suffix(".jsonl")
        scores = evaluate(
            model,
            self.suite,
            adapter,
            name=name,
            store=self._store(home),
            verdicts=self._store(home, "verdicts"),
            records=records,
        )
        if is_main():
            write_json(file, {"key": key, "scores": scores})
            refused = read_score(scores.get("task_refused")).score or 0.0
            if name == "aligned" and refused > _REFUSED:
                logging.warning(
                    "the aligned base refuses %.0f %% of the task's prompts: what a user learns beside Buffer loses "
                    "by that when Buffer is taken out; align it on benign prompts of such kinds too",
                    100 * refused,
                )
        return scores if is_main() else {}

    def _store(self, folder: pathlib.Path, of: str = "answers") -> Store:
        """The answers, or verdicts, that are kept in a folder."""
        file = folder / f"{of}.jsonl"
        if file not in self._stores:
            self._stores[file] = Store(file)
        return self._stores[file]

    def _adapter_hashes(self) -> dict[str, str]:
        made = {
            "sft": self.sft_adapter,
            "user": self.user_adapter,
            "reinforce": self.reinforce_adapter,
            "released": self._released,
        }
        return {name: adapter_fingerprint(adapter) for name, adapter in made.items()}


def _save_model(folder: pathlib.Path, spec: ModelSpec, tokenizer, params: dict) -> None:
    write_hf(folder, spec, jax.device_get(params), tokenizer)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
