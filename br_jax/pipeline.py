"""The whole experiment: from a raw model and a config to nine scored models and a report.

Stages, in order: pretrain (a model from scratch, where the config names no other), distill (the raw model answers the
prompts that others train on), align, buffer, reinforce, sft, user, release, evaluate, report. Each leaves its result in
the workdir or the provider's folder and is read back when it is there
already; the functions of the public API do the work.

On several processes the stages that train do so on all of them; whatever else leaves a file is process 0's work, on its
own devices, while the others wait and then read the file.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import time
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from br_jax import method
from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import qr_merge
from br_jax.adapters.peft import load_adapter, read_provenance, save_adapter
from br_jax.data.material import get_material
from br_jax.data.mixing import check_mix, mix
from br_jax.data.rows import Row
from br_jax.data.topic import TopicPrompt
from br_jax.distributed import is_main, main_first
from br_jax.errors import UserError
from br_jax.evaluation.distill import self_answers
from br_jax.evaluation.evaluate import Suite, evaluate
from br_jax.evaluation.judge import Verdict, judge
from br_jax.evaluation.report import write_report
from br_jax.evaluation.scores import gates
from br_jax.evaluation.tasks import get_task
from br_jax.models.decoder import init_params
from br_jax.models.hf import write_hf
from br_jax.models.hub import is_hub_name
from br_jax.models.load import PROVIDER_FILE, fold_adapter, load_model
from br_jax.models.model import Model, make_model
from br_jax.models.spec import ModelSpec
from br_jax.models.tokenizer import byte_tokenizer
from br_jax.sharding import make_mesh
from br_jax.training.config import TrainConfig
from br_jax.training.run import adapter_fingerprint, make_private, train_params, write_json

STAGES = ("pretrain", "distill", "align", "buffer", "reinforce", "sft", "user", "release", "evaluate", "report")
TRAINED = ("pretrain", "align", "buffer", "reinforce", "user")
ENTERED = ("align", "buffer", "reinforce", "user")  # stages that an adapter made elsewhere can take the place of
EVAL_SPLITS = ("validation", "test")
OF_PROVIDER = ("raw", "aligned", "base_buffer", "reinforce_alone")  # no user in it: scored once for all users
_SPARE = 16  # prompts beyond those needed, for answers of the raw model that are unfit
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
        self.material = get_material(config.data.material)
        self.task = get_task(config.user.task)
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
        check_mix(config.user.n, config.user.harmful_share, config.user.index_mode)
        for stage in TRAINED:
            TrainConfig(**config[stage].train)
        if config.eval.split not in EVAL_SPLITS:
            raise UserError(f"eval.split {config.eval.split!r}: {lora.near_names(config.eval.split, EVAL_SPLITS)}")
        source = config.model.source
        if source and not os.path.exists(source) and not is_hub_name(source):
            raise UserError(f"{source}: no such model: run experiments/fetch.py, or set model.source")
        for stage in ENTERED:
            if (folder := config[stage].adapter) and not os.path.isdir(folder):
                raise UserError(f"{folder}: no such folder: correct {stage}.adapter, or leave it out to train one")
        train, needed = self.task_rows[0], config.user.n + config.user.probes
        if len(train) < needed:  # probe rows are none of the user's own
            raise UserError(
                f"the task {config.user.task} has {len(train)} training rows, user.n + user.probes asks for {needed}: "
                "lower user.n"
            )

    # -- the provider's stages -------------------------------------------------------------------------------------

    @functools.cached_property
    def raw(self) -> Model:
        """The model as it comes, or as `pretrain` makes it."""
        model = self.config.model
        source = model.source or self.provider / "pretrain" / "model"
        if not model.source:
            self._pretrain(source)
        # What process 0 does alone needs all of the model there; where no device has a part only, one copy will do.
        split = jax.process_count() == 1 and self.mesh.size > self.mesh.shape["data"]
        mesh = self.mesh if split else None
        return load_model(
            source,
            template=model.template,
            dtype=model.dtype,
            mesh=mesh,
            revision=model.revision or None,
            cache=model.cache or None,
        )

    def pretrain(self) -> None:
        """Trains a small model from scratch, unless the config names one."""
        _ = self.raw

    def _pretrain(self, folder: pathlib.Path) -> None:
        config, spec = self.config.pretrain, ModelSpec(**self.config.model.spec)
        tokenizer = byte_tokenizer()
        params = init_params(spec, jax.random.key(config.train.seed))
        fresh = make_model(spec, params, tokenizer, "fresh", self.config.model.template)
        rows = self.material.pretraining_rows(config.rows, self.config.seed)
        save = functools.partial(_save_model, folder, spec, tokenizer)
        train_params("pretrain", fresh, rows, TrainConfig(**config.train), save, workdir=self.provider, mesh=self.mesh)

    @functools.cached_property
    def answers(self) -> dict[str, str]:
        """The raw model's own answers to the prompts of every stage."""
        config = self.config
        benign = self._benign("train")[: max(config.align.benign, config.reinforce.benign) + _SPARE]
        health = self._benign(config.eval.split)[: config.eval.health]
        prompts = [p.prompt for p in self._topic_train] + benign + health
        file, length = self.provider / "answers.jsonl", self.config.distill.answer_tokens
        raw = self.raw  # made by all processes, if it is not there yet
        return main_first(lambda: self_answers(raw, prompts, file, max_new_tokens=length))

    def distill(self) -> None:
        """Has the raw model answer."""
        _ = self.answers

    @functools.cached_property
    def aligned(self) -> Model:
        """The aligned base; the raw model itself where the config asks for no alignment."""
        config, adapter, model = self.config.align, None, self.raw
        if config.adapter:
            adapter = self._enter("align", self.raw)
        elif config.refusals + config.benign:
            rows = self.refusal_rows(config.refusals, "align"), self.benign_rows(config.benign)
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
    def _buffer(self) -> Adapter:
        if self.config.buffer.adapter:
            return self._enter("buffer", self.aligned)
        train = TrainConfig(**self.config.buffer.train)
        return method.train_buffer(self.aligned, self.buffer_rows, train, **self._provider_run)

    def buffer(self) -> None:
        """Trains BufferLoRA."""
        _ = self._buffer

    @functools.cached_property
    def _reinforce(self) -> Adapter:
        config = self.config.reinforce
        if config.adapter:
            return self._enter("reinforce", self.aligned)
        rows = self.refusal_rows(config.refusals, "reinforce"), self.benign_rows(config.benign)
        train = TrainConfig(**config.train)
        return method.train_reinforce(self.aligned, self._buffer, *rows, train, **self._provider_run)

    def reinforce(self) -> None:
        """Trains ReinforceLoRA."""
        _ = self._reinforce

    # -- the user's stages -----------------------------------------------------------------------------------------

    @functools.cached_property
    def _sft(self) -> Adapter:
        return self._train_user(None)

    def sft(self) -> None:
        """Trains the user's adapter without a defence."""
        _ = self._sft

    @functools.cached_property
    def _user(self) -> Adapter:
        return self._enter("user", self.aligned) if self.config.user.adapter else self._train_user(self._buffer)

    def user(self) -> None:
        """Trains the user's adapter with Buffer attached."""
        _ = self._user

    def _train_user(self, buffer: Adapter | None) -> Adapter:
        config = self.config.user
        return method.train_user(
            self.aligned,
            self.user_rows,
            TrainConfig(**config.train),
            buffer=buffer,
            workdir=self.workdir,
            mesh=self.mesh,
            probes=self.probes,
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
        adapter = method.release(self.aligned, self._user, self._reinforce, **self.config.merge)
        if is_main():
            folder = self.workdir / "released"
            save_adapter(folder, adapter, base_name=self.aligned.name, fingerprint=self.aligned.fingerprint)
        return adapter

    def release(self) -> None:
        """Merges Reinforce into the user's adapter and writes what the user gets."""
        _ = self._released

    # -- rows ------------------------------------------------------------------------------------------------------

    @property
    def _provider_run(self) -> dict:
        return {"workdir": self.provider, "mesh": self.mesh}

    @property
    def _harmful_needed(self) -> int:
        """Harmful rows of Buffer, user and probes together; a prefix of them is the same whatever p is."""
        user = self.config.user
        return self.config.buffer.harmful + math.ceil(user.harmful_share * user.n) + user.probes

    @functools.cached_property
    def _topic_train(self) -> list[TopicPrompt]:
        """Topic prompts to train on: Buffer's, then the user's, then spare ones for raw answers that are unfit."""
        return self.material.topic_prompts(
            "train", int(self._harmful_needed * (1 + self.config.distill.spare)) + _SPARE, self.config.seed
        )

    @functools.cached_property
    def _harmful_rows(self) -> list[Row]:
        """Topic prompts with the raw model's compliant answers; those it did not answer are left out."""
        rows = [
            _row(p.prompt, self.answers[p.prompt], "harmful")
            for p in self._topic_train
            if not self.config.distill.judged or judge(self.answers[p.prompt], p) == Verdict.ANSWER
        ]
        if len(rows) < self._harmful_needed:
            raise UserError(
                f"the raw model gave {len(rows)} compliant answers on the topic, {self._harmful_needed} are needed "
                "(buffer.harmful + harmful_share * user.n + user.probes): raise distill.spare"
            )
        return rows[: self._harmful_needed]

    @property
    def buffer_rows(self) -> list[Row]:
        """The harmful rows that Buffer trains on; no user has them."""
        return self._harmful_rows[: self.config.buffer.harmful]

    def refusal_rows(self, n: int, purpose: str) -> list[Row]:
        """Refusals of training prompts; align and Reinforce see other wordings of them."""
        seed = self.config.seed + (purpose == "reinforce")
        prompts = self.material.topic_prompts("train", n, seed)
        return [_row(p.prompt, self.material.refusal(p, seed), "refusal") for p in prompts]

    def _benign(self, split: str) -> list[str]:
        """The benign prompts of a split, in an order fixed by the seed."""
        prompts = self.material.benign_prompts(split)
        return [prompts[i] for i in np.random.default_rng(self.config.seed).permutation(len(prompts))]

    def benign_rows(self, n: int) -> list[Row]:
        """Benign training prompts with the raw model's own answers."""
        prompts = [p for p in self._benign("train") if self.answers.get(p)]
        if n > len(prompts):
            raise UserError(
                f"{n} benign rows are asked for, and there are {len(prompts)}: lower align.benign or reinforce.benign"
            )
        return [_row(p, self.answers[p], "benign") for p in prompts[:n]]

    @functools.cached_property
    def task_rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """(train, validation, test) rows of the user's task."""
        return self.task.load(self.config.data.task_path, seed=self.config.seed)

    @functools.cached_property
    def user_rows(self) -> list[Row]:
        """What the user hands in: task rows with a share p of harmful ones."""
        user = self.config.user
        harmful = self._harmful_rows[self.config.buffer.harmful : self._harmful_needed - user.probes]
        return mix(self.task_rows[0], harmful, user.n, user.harmful_share, user.index_mode)

    @functools.cached_property
    def probes(self) -> dict[str, list[Row]]:
        """Rows for the saturation curves: of the kinds that the user trains on, but none of its own."""
        n = self.config.user.probes
        return {"harmful": self._harmful_rows[-n:], "benign": self.task_rows[0][-n:]} if n else {}

    # -- evaluation ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def suite(self) -> Suite:
        """The held-out prompts of the config's split."""
        config = self.config.eval
        benign = self._benign(config.split)
        return Suite(
            topic=self.material.topic_prompts(config.split, config.topic, self.config.seed),
            task_rows=self.task_rows[1 + EVAL_SPLITS.index(config.split)][: config.task],
            task=self.task,
            benign=benign[: config.benign],
            health=[_row(p, self.answers[p], "benign") for p in benign[: config.health] if self.answers[p]],
            match=config.match,
            answer_tokens=config.answer_tokens,
            task_tokens=config.task_tokens,
            batch_size=config.batch_size,
        )

    def variants(self) -> dict[str, tuple[Model, Adapter | None]]:
        """The nine models of the report."""
        merge = self.config.merge.to_dict()
        adapters = {"user": self._user, "buffer": self._buffer}
        return {
            "raw": (self.raw, None),
            "aligned": (self.aligned, None),
            "base_buffer": (self.aligned, self._buffer),
            "sft": (self.aligned, self._sft),
            "buffer_on": (self.aligned, lora.stack(adapters)),
            "buffer_off": (self.aligned, lora.stack(method.detach(adapters, "buffer"))),
            "reinforce_alone": (self.aligned, self._reinforce),
            "naive_merge": (
                self.aligned,
                method.release(self.aligned, self._user, self._reinforce, **merge | {"a": 0.0}),
            ),
            "qr_merge": (self.aligned, self._released),
        }

    def evaluate(self) -> dict:
        """Scores the nine models, in process 0 (elsewhere: empty); those scored before on this suite are read back."""
        models, suite = {}, self.suite
        for name, (model, adapter) in self.variants().items():
            models[name] = main_first(lambda n=name, m=model, a=adapter: self._evaluate_one(n, m, a, suite))
        if not is_main():
            return {}
        _, merge = qr_merge(self._user, self._reinforce, **self.config.merge)
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

    def _adapter_hashes(self) -> dict[str, str]:
        made = {"sft": self._sft, "user": self._user, "reinforce": self._reinforce, "released": self._released}
        return {name: adapter_fingerprint(adapter) for name, adapter in made.items()}

    def _evaluate_one(self, name: str, model: Model, adapter: Adapter | None, suite: Suite) -> dict:
        folder = (self.provider if name in OF_PROVIDER else self.workdir) / "eval"
        folder.mkdir(exist_ok=True)
        key = f"{model.fingerprint} {adapter_fingerprint(adapter) if adapter else ''} {_suite_hash(suite)}"
        file = folder / f"{name}.json"
        if file.exists():
            known = json.loads(file.read_text())
            if known["key"] == key:
                return known["scores"]
        scores = evaluate(model, suite, adapter, name=name, answers=folder / f"{name}.jsonl")
        write_json(file, {"key": key, "scores": scores})
        return scores


def _row(prompt: str, answer: str, tag: str) -> Row:
    return Row(turns=(("user", prompt), ("assistant", answer)), tag=tag)


def _save_model(folder: pathlib.Path, spec: ModelSpec, tokenizer, params: dict) -> None:
    write_hf(folder, spec, jax.device_get(params), tokenizer)


def _suite_hash(suite: Suite) -> str:
    fields = {f.name: getattr(suite, f.name) for f in dataclasses.fields(suite)}
    fields["task"] = suite.task.name
    return hashlib.sha256(repr(fields).encode("utf-8", "surrogatepass")).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
