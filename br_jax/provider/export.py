"""What is handed on: one adapter, or a model with it folded in, that PEFT, transformers and vLLM load."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from br_jax.adapters import lora, peft
from br_jax.adapters.compress import best_rank
from br_jax.adapters.lora import Adapter
from br_jax.errors import UserError
from br_jax.files import require_replaceable
from br_jax.models.io.hf import write_hf
from br_jax.models.model import Model, fold_adapter
from br_jax.provider.folder import find_folder, load_model

# what a folder that may be replaced holds
_MARKS = {"adapter": (peft.CONFIG_FILE, peft.WEIGHTS_FILE), "model": ("config.json",)}


def export(
    source: str | os.PathLike,
    adapter: str | os.PathLike | None,
    folder: str | os.PathLike,
    *,
    form: str = "adapter",
    rank: int | None = None,
    revision: str | None = None,
    **load: str,
) -> dict[str, Any]:
    """Loads a model and an adapter, and writes the adapter alone or the two as one model.

    Args:
        source: of the model, as for `load_model`.
        adapter: folder in PEFT's layout; None is the model alone.
        folder: where to; neither a source, nor in one, nor around one.
        form: "adapter" or "model".
        rank: of the adapter that is written, see `export_adapter`; None keeps its own.
        revision: of a model on the Hub.
        **load: template and dtype, see `load_model`.

    Returns:
        The figures of `export_adapter` or `export_model`.

    Raises:
        UserError: a Buffer, an adapter that is missing or of another model, or a folder that must not be written.
    """
    if form == "adapter" and adapter is None:
        raise UserError("no adapter to export: give its folder, or export the model")
    if form == "model" and rank is not None:
        raise UserError("a rank is for an adapter: a model has the adapter folded in")
    own = find_folder(source, revision)
    # all that can be said before a model is loaded for nothing
    _require_apart(folder, [place for place in (source, adapter, own) if place is not None])
    require_replaceable(folder, form, _MARKS[form])
    if adapter is not None:
        _refuse_buffer(folder, peft.read_provenance(adapter).get("roles", ()))
    model = load_model(source, revision=revision, **load)
    loaded = None
    if adapter is not None:
        loaded = peft.load_adapter(adapter, model.params, fingerprint=model.fingerprint)
    if form == "adapter":
        return export_adapter(model, loaded, folder, rank)
    return export_model(model, loaded, folder, own)


def export_adapter(
    model: Model, adapter: Adapter, folder: str | os.PathLike, rank: int | None = None
) -> dict[str, Any]:
    """Writes an adapter as a folder in PEFT's layout, of a lower rank if asked to.

    Args:
        model: its base.
        adapter: without a Buffer in it.
        folder: an earlier adapter there is replaced, any other content refused.
        rank: the nearest adapter of this rank is written instead, see `adapters.compress.best_rank`.

    Returns:
        "folder", "base", "fingerprint" (the base's), "roles", "rank" and, with a rank, "relative_error" (of all
        matrices together) and "worst_matrix" ("path", "layer", "relative_error").

    Raises:
        UserError: a Buffer, an adapter of another model, or a folder that cannot be written.
    """
    _refuse_buffer(folder, adapter.roles)
    require_replaceable(folder, "adapter", _MARKS["adapter"])
    lora.validate(adapter, model.params)
    loss = {}
    if rank is not None:
        adapter, figures = best_rank(adapter, rank)
        loss = {"relative_error": figures["relative_error"], "worst_matrix": _worst(figures["matrices"])}
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
    model: Model, adapter: Adapter | None, folder: str | os.PathLike, like: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Writes a Hugging Face folder of a model, with an adapter added into its weights.

    Args:
        model: the base, an aligned one for instance.
        adapter: without a Buffer in it (added in f32, rounded once to the model's dtype); None is the base itself.
        folder: an earlier model there is replaced, any other content refused.
        like: the folder that the base came from, for its config, tokenizer files and license.

    Returns:
        "folder", "base", "fingerprint" (of what was written), "roles", "dtype", "template" (which the model was
        loaded with; the folder itself says only the tokenizer's own) and, with an adapter, "unchanged_share": the part
        of the adapted entries that rounding left as they were.

    Raises:
        UserError: a Buffer, an adapter of another model, or a folder that cannot be written.
    """
    _require_apart(folder, [] if like is None else [like])
    require_replaceable(folder, "model", _MARKS["model"])
    whole, rounding = model, {}
    if adapter is not None:
        _refuse_buffer(folder, adapter.roles)
        whole = fold_adapter(model, adapter, model.name)
        rounding = {"unchanged_share": _unchanged_share(model, whole, adapter)}
    write_hf(folder, whole.spec, whole.params, whole.tokenizer, like=like)
    return {
        "folder": str(folder),
        "base": model.name,
        "fingerprint": whole.fingerprint,
        "roles": [] if adapter is None else list(adapter.roles),
        "dtype": str(whole.params["embed"]["embedding"].dtype),
        "template": model.template,
        **rounding,
    }


def _refuse_buffer(folder: str | os.PathLike, roles: Iterable[str]) -> None:
    if "buffer" in roles:
        raise UserError(
            f"{folder}: refused to export an adapter that holds a buffer (roles {'+'.join(roles)}): it undoes the "
            "model's alignment; detach it, or keep it in the provider's folder"
        )


def _require_apart(folder: str | os.PathLike, sources: Iterable[str | os.PathLike]) -> None:
    """Raises a `UserError` where writing the folder could change what it is made from."""
    target = Path(folder).resolve()
    for source in map(Path, sources):
        place = source.resolve()
        if target == place or target in place.parents or place in target.parents:
            raise UserError(f"{folder}: is, is in or holds the source {source}: choose another place")


def _worst(matrices: Mapping[str, list[float]]) -> dict[str, Any]:
    """The matrix and layer that lose most."""
    error, path, layer = max((error, path, i) for path, errors in matrices.items() for i, error in enumerate(errors))
    return {"path": path, "layer": layer, "relative_error": error}


def _unchanged_share(model: Model, folded: Model, adapter: Adapter) -> float:
    """The mean of `lora.unchanged_share` over all adapted entries."""
    shapes = lora.kernel_shapes(model.params)
    sizes = {path: math.prod(shapes[path]) for path in adapter.weights}
    shares = lora.unchanged_share(model.params, folded.params, adapter)
    return sum(share * sizes[path] for path, share in shares.items()) / sum(sizes.values())
