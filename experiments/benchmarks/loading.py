"""Reading a large model from safetensors, onto a mesh and onto one device, and by transformers: memory and time."""

import gc
import importlib
import pathlib

import jax
import ml_dtypes
import numpy as np

from benchmarks.inputs import HERE, Setup, require_torch
from benchmarks.pairing import Contender, call
from benchmarks.report import Case
from br_jax.core.mesh import make_mesh
from br_jax.models.decoder import abstract_params
from br_jax.models.io.hf import write_hf
from br_jax.models.spec import ModelSpec
from br_jax.models.tokenizer import byte_tokenizer
from br_jax.provider import load_model

# 1.45 billion params: 2.9 GB in bf16.
SPEC = ModelSpec(
    vocab_size=64000,
    embed_dim=2048,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    ffw_dim=5632,
)
SHARD_BYTES = 500_000_000
DEVICES = 8


def cases(setup: Setup, spec: ModelSpec = SPEC, shard_bytes: int = SHARD_BYTES) -> list[Case]:
    """A random model in bf16 shards, made on the spot."""
    require_torch("loading")
    folder = setup.folder / "large"
    call(HERE / "loading.py", "make", folder=folder, spec=spec, shard_bytes=shard_bytes)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    ours = {"folder": folder, "devices": DEVICES}
    return [
        Case(
            "loading",
            f"{spec.num_params / 1e9:.2f} billion random params, bf16, {size / 1e9:.2f} GB in files of "
            f"{shard_bytes / 1e6:.0f} MB; ours with the fingerprint of every byte, over {DEVICES} devices of the CPU "
            "(FSDP) and on one; transformers' from_pretrained, every page touched; the peak less what is resident "
            f"before, divided by {size / 1e9:.2f} GB, is what loading takes of the host",
            [
                Contender(f"br_jax, {DEVICES} devices", HERE / "loading.py", "load", ours),
                Contender("br_jax, 1 device", HERE / "loading.py", "load", {**ours, "devices": 1}),
                Contender("transformers", HERE / "torch_loading.py", "load", {"folder": folder}),
            ],
            "GB",
        )
    ]


def load(folder: pathlib.Path, devices: int):
    """A contender's work: the model, in the place of the one before."""
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = make_mesh(1, devices) if devices > 1 else None
    importlib.import_module("transformers.models.auto.tokenization_auto")  # what it imports is no part of the loading
    held = []

    def unit(index: int):
        held.clear()
        gc.collect()
        model = load_model(folder, dtype="bfloat16", mesh=mesh)
        held.append(model)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 1e9, model.fingerprint

    return unit


def make(folder: pathlib.Path, spec: ModelSpec, shard_bytes: int):
    """A contender for `call`: writes the model; its layers are alike, so that it never exists in memory."""

    def unit(index: int):
        noise = np.random.default_rng(0).normal(size=1 << 20, scale=0.02).astype(ml_dtypes.bfloat16)
        params = jax.tree.map(
            lambda leaf: np.broadcast_to(np.resize(noise, leaf.shape[-2:]), leaf.shape), abstract_params(spec)
        )
        write_hf(folder, spec, params, byte_tokenizer(), shard_bytes=shard_bytes)
        return 0, None

    return unit
