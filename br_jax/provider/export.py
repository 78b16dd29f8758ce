"""What is handed on: one adapter, or a model with it folded in, that PEFT, transformers and vLLM load."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from br_jax.adapters import lora, peft
from br_jax.adapters.compress import best_rank
from br_jax.adapters.guard import warn_unguarded
from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import RANK, require
from br_jax.core.errors import UserError
from br_jax.core.io import require_replaceable
from br_jax.core.records import fingerprint
from br_jax.models.io.hf import write_hf
from br_jax.models.io.load import require_dtype
from br_jax.models.model import Model, cast_model, fold_adapter, require_releasable
from br_jax.provider.folder import find_folder, is_provider, load_model

# what a folder that may be replaced holds
_MARKS = {"adapter": (peft.CONFIG_FILE, peft.WEIGHTS_FILE), "model": ("config.json",)}


def export(
    source: str | os.PathLike,
    adapter: str | os.PathLike | None,
    folder: str | os.PathLike,
    *,
    form: str = "adapter",
    rank: int | None = None,
    role: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    **load: str,
) -> dict[str, Any]:
    """Loads a model and an adapter's folder, and writes the adapter alone or the two as one model.

    Args:
        source: of the model, as for `load_model`.
        adapter: folder in PEFT's layout; None is the model alone.
        folder: where to; neither a source, nor in one, nor around one.
        form: "adapter" or "model".
        rank: see `export_adapter`.
        role: what the adapter is, where its folder does not say.
        dtype, revision, **load: see `load_model`. A provider's base is read as it is recorded, and rounded to `dtype`
            when all is added.

    Returns:
        The figures of `export_adapter` or `export_model`, which say too what is refused.
    """
    if form == "adapter" and adapter is None:
        raise UserError("no adapter to export: give its folder, or export the model")
    if form == "model" and rank is not None:
        raise UserError("a rank is for an adapter: a model has the adapter folded in")
    if rank is not None:
        require("rank", rank, RANK)
    own = find_folder(source, revision)
    # all that can be said before a model is loaded for nothing
    _require_apart(folder, [place for place in (source, adapter, own) if place is not None])
    require_replaceable(folder, form, _MARKS[form])
    if adapter is not None:
        lora.refuse_buffer(folder, peft.read_provenance(adapter).get("roles", [role or lora.UNKNOWN]))
    model = load_model(source, revision=revision, dtype=None if is_provider(source) else dtype, **load)
    loaded = None
    if adapter is not None:
        loaded = peft.load_adapter(adapter, model.params, fingerprint=model.fingerprint, role=role)
    if form == "adapter":
        return export_adapter(model, loaded, folder, rank)
    return export_model(model, loaded, folder, own, dtype)


def export_adapter(
    model: Model, adapter: Adapter, folder: str | os.PathLike, rank: int | None = None
) -> dict[str, Any]:
    """Writes an adapter as a folder in PEFT's layout; an earlier one there is replaced.

    Args:
        rank: the nearest adapter of this rank is written instead, see `adapters.compress.best_rank`.

    Returns:
        "folder", "base", "fingerprint" (the base's), "roles", "rank" and, with a rank, "relative_error" (of all
        matrices together) and "worst_matrix" ("path", "layer", "relative_error").

    Raises:
        UserError: a Buffer (by its numbers too, where the model has a guard; a warning says where it has none), an
            adapter of unknown role or of another model, or a folder that cannot be written or holds something else.
    """
    require_replaceable(folder, "adapter", _MARKS["adapter"])
    lora.validate(adapter, model.params)
    require_releasable(model, adapter, folder)
    loss = {}
    if rank is not None:
        adapter, figures = best_rank(adapter, rank)
        errors = [(e, path, layer) for path, each in figures["matrices"].items() for layer, e in enumerate(each)]
        worst = dict(zip(("relative_error", "path", "layer"), max(errors), strict=True))
        loss = {"relative_error": figures["relative_error"], "worst_matrix": worst}
    peft.save_adapter(folder, adapter, base_name=model.name, fingerprint=model.fingerprint, extra=loss)
    return {
        "folder": str(folder),
        "base": model.name,
        "fingerprint": model.fingerprint,
        "roles": list(adapter.roles),
        "rank": max(pair["a"].shape[-1] for pair in adapter.weights.values()),
        **loss,
    }


def export_model(
    model: Model,
    adapter: Adapter | None,
    folder: str | os.PathLike,
    like: str | os.PathLike | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Writes a Hugging Face folder of a model, with an adapter added into its weights; an earlier one is replaced.

    Args:
        adapter: added in f32, rounded once to the model's dtype; None is the base itself.
        like: the folder that the base came from, for its config, tokenizer files and license.
        dtype: what is then rounded to; None is the model's.

    Returns:
        "folder", "base", "fingerprint" (of what was written), "roles", "dtype", "template" (which the model was
        loaded with; the folder itself says only the tokenizer's own) and, with an adapter, "unchanged_share": the part
        of the adapted entries that rounding left as they were.

    Raises:
        UserError: as `export_adapter`, of the adapter and of what was folded into the model before.
    """
    _require_apart(folder, [] if like is None else [like])
    dtype = dtype or model.dtype
    require_dtype(dtype)
    whole, rounding = model, {}
    if adapter is not None:
        lora.refuse_buffer(folder, adapter.roles)
        whole = fold_adapter(model, adapter, model.name)
        rounding = {"unchanged_share": lora.unchanged_share(model.params, whole.params, adapter)}
    if model.guard is None:
        warn_unguarded(folder)
    else:
        for params in (model.params, whole.params):  # either may hold half of a Buffer
            model.guard.refuse_model(folder, params)
    whole = cast_model(whole, dtype)
    write_hf(folder, whole.spec, whole.params, whole.tokenizer, like=like, stop_tokens=whole.stop_tokens)
    return {
        "folder": str(folder),
        "base": model.name,
        "fingerprint": fingerprint(whole.params, whole.spec.to_json()),
        "roles": [] if adapter is None else list(adapter.roles),
        "dtype": dtype,
        "template": model.template,
        **rounding,
    }


def _require_apart(folder: str | os.PathLike, sources: Iterable[str | os.PathLike]) -> None:
    """Raises a `UserError` where writing the folder could change what it is made from."""
    target = Path(folder).resolve()
    for source in map(Path, sources):
        place = source.resolve()
        if target == place or target in place.parents or place in target.parents:
            raise UserError(f"{folder}: is, is in or holds the source {source}: choose another place")
