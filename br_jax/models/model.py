"""A model as the rest of the project sees it: spec, frozen params, tokenizer, and where they came from."""

import dataclasses
import hashlib
import json

import jax
import numpy as np

from br_jax.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen base model.

    Attributes:
        spec: sizes.
        params: the tree of `models.decoder`, in the compute dtype; nothing in br_jax ever writes to it.
        tokenizer: a `transformers.PreTrainedTokenizerFast`.
        name: what an adapter's config calls its base.
        template: "alpaca" or "chat", see `data.templates`.
        fingerprint: SHA-256 of spec and params, by which adapters know their base.
    """

    spec: ModelSpec
    params: dict
    tokenizer: object
    name: str
    template: str
    fingerprint: str


def make_model(spec: ModelSpec, params: dict, tokenizer, name: str, template: str) -> Model:
    """A `Model` with its fingerprint taken from the content."""
    return Model(spec, params, tokenizer, name, template, fingerprint(params, json.dumps(dataclasses.asdict(spec))))


def fingerprint(tree, extra: str = "") -> str:
    """SHA-256 over paths, shapes, dtypes and bytes of a pytree of arrays (fetched to the host leaf by leaf)."""
    digest = hashlib.sha256(extra.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode())
        digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()
