"""Every stage of a config as a program on abstract arrays: shapes, dtypes and shardings, no memory."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from br_jax.adapters import lora
from br_jax.core.errors import UserError, near_names
from br_jax.core.mesh import abstract, constrain_tree, platform
from br_jax.experiment.settings import settle
from br_jax.inference.generate import decode, prefill
from br_jax.models.decoder import Decoder, abstract_params, decoder_of, init_cache, unembed
from br_jax.models.io.load import read_spec
from br_jax.models.kernels import resolve_precision
from br_jax.models.spec import ModelSpec
from br_jax.training import step
from br_jax.training.config import TrainConfig

TRAINING = ("buffer", "reinforce", "user", "sft", "pool")
PROGRAMS = (*TRAINING, "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a stage."""

    stage: str
    decoder: Decoder  # with its remat and attention
    dtype: jnp.dtype  # of the base and of what is computed
    batch: int  # rows of a call
    context: int  # keys that a token may look at, at most
    lowering: Callable  # of its arguments; donated ones are the result's buffers
    arguments: dict  # name -> abstract pytree, in order

    @property
    def tokens(self) -> int:
        """That a call processes, all chips together, padding counted."""
        return self.batch if self.stage == "decode" else self.batch * self.context

    @property
    def attention(self) -> str:
        """The implementation in use."""
        return self.decoder.attends(self.context, self.dtype, self.stage != "decode").implementation

    def lower(self, mesh: Mesh):
        """Lowers for the mesh, every argument laid out by the table."""
        laid = abstract(self.arguments, mesh)  # which sorts the names
        with jax.set_mesh(mesh):
            return self.lowering(*(laid[name] for name in self.arguments))


def make_program(config: ConfigDict, stage: str, mesh: Mesh, batch: int = 0, slots: int = 8) -> Program:
    """A stage of a config as it would run on a mesh, from `model.spec` or from the metadata of `model.source`.

    "pool" is a turn of `slots` users beside Buffer, with an equal part of the rows each, "prefill" takes prompts of the
    user stage's `max_length`, "decode" a token each behind `eval.answer_tokens` more. `batch` is rows of a call instead
    of the config's. A `UserError` for bad settings, or no model.
    """
    if stage not in PROGRAMS:
        raise UserError(f"stage {stage!r}: {near_names(stage, PROGRAMS)}")
    settle(config)
    spec = ModelSpec(**config.model.spec) if config.model.spec else read_spec(config.model.source)
    params = abstract_params(spec, jnp.dtype(config.model.dtype))
    precision = resolve_precision(config.model.matmul_precision, config.model.dtype, platform(mesh))
    decoder = decoder_of(spec, abstract(params, mesh), precision)  # as a `Model` there has it
    if stage in TRAINING:
        return _training(config, stage, decoder, params, mesh, batch, slots if stage == "pool" else 0)
    return _generation(config, stage, decoder, params, batch)


def train_section(config: ConfigDict, stage: str) -> ConfigDict:
    """The settings of a training stage; plain SFT and a pool have the user stage's."""
    return config["user" if stage in ("sft", "pool") else stage].train


def _training(config, stage, decoder, params, mesh, batch, slots) -> Program:
    train = TrainConfig(**train_section(config, stage))
    rows = batch or train.batch_size // train.accumulation * slots or train.batch_size

    def arrays(params):
        has_buffer = stage in ("reinforce", "user", "pool")
        frozen = {"buffer": _adapter(params, config.buffer.train, "buffer")} if has_buffer else {}
        adapter = _adapter(params, train, "user")
        one = step.first_state(adapter, 0) if slots else step.init_state(step.trainable_adapter(adapter), 0)
        state = step.empty_state(one, slots) if slots else one
        return state, step.frozen_collections(params, frozen, train.frozen), step.Hyper.of(train)

    state, frozen, hyper = jax.eval_shape(arrays, params)
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), "int32") | {"weights": "float32"}
    inputs = {name: jax.ShapeDtypeStruct((rows, train.max_length), each) for name, each in dtypes.items()}
    how = step.Stage.of(decoder, train, mesh)
    if slots:
        how, flags = how._replace(accumulation=1), jax.ShapeDtypeStruct((slots,), jnp.bool_)
        hyper = step.Turn(jax.tree.map(lambda x: jax.ShapeDtypeStruct((slots,), x.dtype), hyper), flags, flags)
        inputs["piece"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    arguments = {"state": state, "frozen": frozen, "batch": inputs, "hyper": hyper}
    lowering = functools.partial((step.pool_step if slots else step.train_step).lower, how)
    return Program(stage, how.decoder, jnp.dtype(config.model.dtype), rows, train.max_length, lowering, arguments)


def _generation(config, stage, decoder, params, batch) -> Program:
    rows, length, spec = batch or config.eval.batch_size, config.user.train.max_length, decoder.spec
    slots, dtype = length + config.eval.answer_tokens, jnp.dtype(config.model.dtype)

    def released(params):
        roles = ("user", "reinforce")
        return lora.collection(lora.stack([_adapter(params, config[role].train, role) for role in roles]))

    def likeliest(variables, hidden):
        return jnp.argmax(unembed(spec, variables["params"], hidden, decoder.matmul_precision), axis=-1)

    def first(variables, tokens, lengths):
        hidden, cache = prefill(decoder, variables, None, tokens, lengths)
        return likeliest(variables, hidden), cache

    def following(variables, token, lengths, cache, slot):
        hidden, cache = decode(decoder, variables, token, lengths, cache, slot)
        return likeliest(variables, hidden), constrain_tree(cache)

    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    arguments = {"variables": {"params": params, "lora": jax.eval_shape(released, params)}}
    if stage == "prefill":
        arguments |= {"tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32), "lengths": row}
        return Program(stage, decoder, dtype, rows, length, jax.jit(first).lower, arguments)
    cache = jax.eval_shape(lambda: init_cache(spec, rows, slots, dtype, stacked=False))
    arguments |= {"token": row, "lengths": row, "cache": cache, "slot": jax.ShapeDtypeStruct((), jnp.int32)}
    return Program(stage, decoder, dtype, rows, slots, jax.jit(following, donate_argnames="cache").lower, arguments)


def _adapter(params, train: TrainConfig | ConfigDict, role: str) -> lora.Adapter:
    return lora.init(jax.random.key(0), lora.target_shapes(params, train.targets), train.rank, train.alpha, role)
