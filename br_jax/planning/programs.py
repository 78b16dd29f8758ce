"""Every stage of a config as a program on abstract arrays: shapes, dtypes and shardings, no memory."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.errors import UserError, near_names
from br_jax.inference.generate import decode, prefill
from br_jax.models.cache import init_cache, join_caches
from br_jax.models.decoder import Decoder, abstract_params, unembed
from br_jax.models.io.load import read_spec
from br_jax.models.masks import Attend
from br_jax.models.spec import ModelSpec
from br_jax.sharding import abstract, constrain_tree, platform
from br_jax.training.config import TrainConfig
from br_jax.training.stage import Hyper, Stage, frozen_collections, init_state, train_step, trainable_adapter

TRAINING = ("buffer", "reinforce", "user", "sft")
STAGES = (*TRAINING, "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a stage.

    Attributes:
        stage: one of `STAGES`.
        spec: the model's sizes.
        function: jitted; its donated arguments are the result's buffers.
        static: arguments that come first and are no arrays.
        arguments: name -> abstract pytree, in order.
        tokens: that a call processes, all chips together, padding counted.
        context: keys that each of them may look at, at most.
        remat: of a training step.
        attention: the implementation in use.
        batch: rows of a call.
        dtype_bytes: of a number in the compute dtype.
    """

    stage: str
    spec: ModelSpec
    function: Callable
    static: tuple
    arguments: dict
    tokens: int
    context: int
    remat: str
    attention: str
    batch: int
    dtype_bytes: int

    @property
    def trains(self) -> bool:
        """Whether it goes backward too."""
        return self.stage in TRAINING

    def lower(self, mesh: Mesh):
        """Lowers for the mesh, every argument laid out by the table."""
        laid = abstract(self.arguments, mesh)  # which sorts the names
        with jax.set_mesh(mesh):
            return self.function.lower(*self.static, *(laid[name] for name in self.arguments))


def make_program(config: ConfigDict, stage: str, mesh: Mesh, batch: int = 0) -> Program:
    """A stage of a config as it would run on a mesh.

    Args:
        config: see configs/base.py; sizes come from `model.spec`, or from the metadata of `model.source`.
        stage: one of `STAGES`. "prefill" takes prompts of the user stage's `max_length`, "decode" a token each behind
            `eval.answer_tokens` more.
        mesh: devices to run on.
        batch: rows of a call instead of the config's.

    Raises:
        UserError: bad settings, or no model.
    """
    spec = ModelSpec(**config.model.spec) if config.model.spec else read_spec(config.model.source)
    params = abstract_params(spec, jnp.dtype(config.model.dtype))
    if stage in TRAINING:
        train = TrainConfig(**train_section(config, stage))
        return _training(stage, spec, params, train, TrainConfig(**config.buffer.train), mesh, batch)
    if stage not in STAGES:
        raise UserError(f"stage {stage!r}: {near_names(stage, STAGES)}")
    return _generation(stage, spec, params, config, mesh, batch or config.eval.batch_size)


def train_section(config: ConfigDict, stage: str) -> ConfigDict:
    """The settings of a training stage; plain SFT has the user stage's."""
    return config["user" if stage == "sft" else stage].train


def _training(stage, spec, params, train: TrainConfig, buffer: TrainConfig, mesh, batch) -> Program:
    rows = batch or train.batch_size

    def arrays(params):
        frozen = {"buffer": _adapter(params, buffer, "buffer")} if stage in ("reinforce", "user") else {}
        trainable = trainable_adapter(_adapter(params, train, "user"))
        return init_state(trainable, 0), frozen_collections(params, frozen, train.frozen)

    state, frozen = jax.eval_shape(arrays, params)
    shape = (rows, train.max_length)
    dtypes = {"tokens": "int32", "targets": "int32", "weights": "float32", "positions": "int32", "segment_ids": "int32"}
    made = Stage.of(spec, train, mesh)
    return Program(
        stage=stage,
        spec=spec,
        function=train_step,
        static=(made,),
        arguments={
            "state": state,
            "frozen": frozen,
            "batch": {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()},
            "hyper": jax.eval_shape(lambda: Hyper.of(train)),
        },
        tokens=rows * train.max_length,
        context=train.max_length,
        remat=train.remat,
        attention=made.decoder.attends(train.max_length, _dtype(params)).implementation,
        batch=rows,
        dtype_bytes=_dtype(params).itemsize,
    )


def _generation(stage, spec, params, config, mesh, rows) -> Program:
    user, reinforce = TrainConfig(**config.user.train), TrainConfig(**config.reinforce.train)

    def released(params):
        return lora.collection(lora.stack([_adapter(params, user, "user"), _adapter(params, reinforce, "reinforce")]))

    length, slots = user.max_length, user.max_length + config.eval.answer_tokens
    decoder = Decoder(spec, attention=Attend(user.attention, platform(mesh)))
    variables = {"params": params, "lora": jax.eval_shape(released, params)}
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    common = {"stage": stage, "spec": spec, "static": (), "remat": "none", "batch": rows}
    common["dtype_bytes"] = _dtype(params).itemsize

    def first(variables, tokens, lengths):
        hidden, cache = prefill(decoder, variables, None, tokens, lengths)
        return jnp.argmax(unembed(spec, variables["params"], hidden), axis=-1), cache

    def following(variables, token, lengths, cache, slot):
        hidden, cache = decode(decoder, variables, token, lengths, cache, slot)
        return jnp.argmax(unembed(spec, variables["params"], hidden), axis=-1), constrain_tree(cache)

    if stage == "prefill":
        words = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        return Program(
            function=jax.jit(first),
            arguments={"variables": variables, "tokens": words, "lengths": row},
            tokens=rows * length,
            context=length,
            attention=decoder.attends(length, _dtype(params)).implementation,
            **common,
        )
    stacked = functools.partial(init_cache, spec, rows, slots, _dtype(params))
    cache = jax.eval_shape(lambda: join_caches([stacked()], slots))
    slot = jax.ShapeDtypeStruct((), jnp.int32)
    return Program(
        function=jax.jit(following, donate_argnames="cache"),
        arguments={"variables": variables, "token": row, "lengths": row, "cache": cache, "slot": slot},
        tokens=rows,
        context=slots,
        attention="xla",
        **common,
    )


def _adapter(params, train: TrainConfig, role: str) -> Adapter:
    return lora.init(jax.random.key(0), lora.target_shapes(params, train.targets), train.rank, train.alpha, role)


def _dtype(params) -> jnp.dtype:
    return jnp.dtype(params["embed"]["embedding"].dtype)
