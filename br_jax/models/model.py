"""A model as the rest of the project sees it: spec, frozen params, tokenizer, and where they came from."""

import dataclasses
import hashlib
from collections.abc import Sequence

import jax
import numpy as np

from br_jax.distributed import fetch
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
        stop_tokens: ids that end an answer; the tokenizer's EOS is one of them.
    """

    spec: ModelSpec
    params: dict
    tokenizer: object
    name: str
    template: str
    fingerprint: str
    stop_tokens: tuple[int, ...]


def make_model(
    spec: ModelSpec, params: dict, tokenizer, name: str, template: str, stop_tokens: Sequence[int] = ()
) -> Model:
    """A `Model` with its fingerprint taken from the content."""
    eos = tokenizer.eos_token_id
    stops = tuple(dict.fromkeys([*([] if eos is None else [eos]), *stop_tokens]))
    return Model(spec, params, tokenizer, name, template, fingerprint(params, spec.to_json()), stops)


def fingerprint(tree, extra: str = "") -> str:
    """SHA-256 over paths, shapes, dtypes and bytes of a pytree of arrays, fetched to the host a layer at a time.

    All processes of a run get the same one.
    """
    digest = hashlib.sha256(extra.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}".encode())
        for part in (leaf[i] for i in range(len(leaf))) if leaf.ndim > 2 else [leaf]:
            array = np.ascontiguousarray(fetch(part) if isinstance(part, jax.Array) else part)
            digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()
