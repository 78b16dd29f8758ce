"""What a provider keeps and hands on.

Its folder: what it records of the aligned base and its adapters, and how that base is read back. And exports: one
adapter, or a model with it folded in, that PEFT, transformers and vLLM load.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh

from br_jax.adapters import lora, peft
from br_jax.adapters.diagnostics import best_rank, warn_unguarded
from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import RANK, require
from br_jax.core.errors import UserError
from br_jax.core.io import require_replaceable
from br_jax.core.records import fingerprint, read_record, write_record
from br_jax.models.io.hf import write_hf
from br_jax.models.io.load import find_source, is_hub_name, read_model, require_dtype
from br_jax.models.kernels import resolve_precision
from br_jax.models.model import Model, cast_model, fold_adapter, guard, require_model, require_releasable

PROVIDER_FILE = "provider.json"
RECORDED_ADAPTERS = ("buffer", "reinforce")  # once they are made
# what a folder that may be replaced holds
_MARKS = {"adapter": (peft.CONFIG_FILE, peft.WEIGHTS_FILE), "model": ("config.json",)}


def load_model(
    source: str | os.PathLike,
    *,
    template: str = "chat",
    dtype: str | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    matmul_precision: str = "float32",
) -> Model:
    """Loads a frozen base.

    Args:
        source: a GGUF file; a Hugging Face folder (config.json and safetensors) or the name of a model on the Hub; or a
            provider's folder, which gives the aligned base: the model that provider.json names, with the align adapter
            folded in, and with the guard of the Buffer that lies there.
        template: "chat" (the model's own) or "alpaca" (the paper's); a provider's folder brings its own.
        dtype: of the params, "float32" or "bfloat16"; None is float32, or what a provider's folder records. Another
            than that is rounded to in the end, so that the adapters made for the base still fit.
        mesh: devices that the params are laid on by `sharding`'s table, each part read straight to its device; None is
            JAX's default device.
        revision: of a model on the Hub: branch, tag or commit.
        matmul_precision: "float32", "bfloat16" or "auto": in what an f32 model's products are made, see
            `models.kernels`; on disk, and to adapters, the model is the same.

    Raises:
        UserError: what is there is missing, damaged, of an unsupported family, or not what provider.json recorded.
    """
    if not is_provider(source):
        settings = {"template": template, "dtype": dtype or "float32", "revision": revision}
        return read_model(source, mesh=mesh, matmul_precision=matmul_precision, **settings)
    folder = Path(source)
    record = read_provider(folder)
    dtype, wanted = dtype or record["dtype"], record["fingerprint"]
    require_dtype(dtype)
    settings = {"template": record["template"], "dtype": record["dtype"], "revision": record.get("revision")}
    model = raw = read_model(record["base"], mesh=mesh, matmul_precision=matmul_precision, **settings)
    if record.get("align"):
        adapter = peft.load_adapter(folder / record["align"], raw.params, fingerprint=raw.fingerprint, role="align")
        model = fold_adapter(raw, adapter, f"{raw.name}-aligned")
    if model.fingerprint != wanted:
        raise UserError(
            f"{folder / PROVIDER_FILE}: the aligned base is {model.fingerprint[:12]}, recorded was {wanted[:12]}: "
            "make it again"
        )
    model = dataclasses.replace(cast_model(model, dtype), matmul_precision=resolve_precision(matmul_precision, dtype))
    return with_guard(model, folder, record)


def with_guard(model: Model, folder: Path, record: dict | None = None) -> Model:
    """The aligned base of a provider's folder with its Buffer as its guard; without one, where the folder has none."""
    known = (record or read_provider(folder)).get("buffer")
    if known is None:
        return model
    if not (place := folder / known["folder"]).exists():
        logging.warning("%s: the Buffer is not there, so what leaves cannot be compared with it", place)
        return model
    return guard(model, load_recorded(folder, "buffer", known, model))


def load_recorded(folder: Path, name: str, known: dict, model: Model) -> Adapter:
    """One of `RECORDED_ADAPTERS`, by what provider.json knows of it; a `UserError` where another lies there."""
    adapter = peft.load_adapter(folder / known["folder"], model.params, fingerprint=model.fingerprint, role=name)
    if lora.fingerprint(adapter) != known["fingerprint"]:
        raise UserError(
            f"{folder / known['folder']}: is not the {name} adapter that {PROVIDER_FILE} records: make it again"
        )
    return adapter


def is_provider(source: str | os.PathLike) -> bool:
    """Whether a path is a provider's folder; `find_source` says what is no path."""
    return isinstance(source, str | os.PathLike) and os.path.isfile(os.path.join(source, PROVIDER_FILE))


def write_provider(
    folder: Path, base: str, align: str | os.PathLike | None, model: Model, dtype: str, revision: str | None
) -> None:
    """Records an aligned base; paths, of the raw one (or its Hub name) and the align adapter, may be from `folder`.

    The adapters that were recorded for the same base stay.
    """
    known = _read(folder) if is_provider(folder) else {}
    kept = RECORDED_ADAPTERS if known.get("fingerprint") == model.fingerprint else ()
    record = {"base": base, "revision": revision, "align": align and str(align), "template": model.template}
    record |= {"dtype": dtype, "fingerprint": model.fingerprint} | {n: known[n] for n in kept if n in known}
    _write(folder, known, record)


def record_adapter(folder: Path, stage: str, place: str | os.PathLike, adapter: Adapter) -> None:
    """Records a Buffer or Reinforce, which lies in `place` (from `folder`), by its numbers."""
    known = _read(folder)
    _write(folder, known, known | {stage: {"folder": str(place), "fingerprint": lora.fingerprint(adapter)}})


def read_provider(folder: Path) -> dict:
    """What provider.json records, with its "base" as a path or a Hub name that can be loaded from anywhere.

    Raises:
        UserError: the file is damaged, or no such record.
    """
    record = _read(folder)
    texts = {name: str for name in ("base", "template", "dtype", "fingerprint")}
    wrong = [n for n, kind in (texts | {"align": str | None, "revision": str | None}).items()
             if not isinstance(record.get(n), kind)]  # fmt: skip
    for name in RECORDED_ADAPTERS:
        known = record.get(name, {"folder": "", "fingerprint": ""})
        if not isinstance(known, dict) or {type(known.get(part)) for part in ("folder", "fingerprint")} != {str}:
            wrong.append(name)
    if wrong:
        what = "adapter's" if wrong[0] in RECORDED_ADAPTERS else "text"
        raise UserError(f"{folder / PROVIDER_FILE}: not a provider's record ({wrong[0]} is no {what}): make it again")
    source = record["base"]
    base = source if is_hub_name(source) and not (folder / source).exists() else str(folder / source)
    return record | {"base": base}


def _read(folder: Path) -> dict:
    return read_record(folder / PROVIDER_FILE, "make the folder again")


def _write(folder: Path, known: dict, record: dict) -> None:
    if record != known:
        write_record(folder / PROVIDER_FILE, record)
    (folder / PROVIDER_FILE).chmod(0o600)  # an earlier br_jax left it for all to read


def base_of(source: str | os.PathLike, revision: str | None = None) -> tuple[str | os.PathLike, str | None]:
    """The source and revision that weights come from: those given, or those of a provider's folder."""
    if not is_provider(source):
        return source, revision
    record = read_provider(Path(source))
    return record["base"], record.get("revision")


def find_folder(source: str | os.PathLike, revision: str | None = None) -> Path | None:
    """The Hugging Face folder that the weights of a source come from, through a provider's folder too; None for GGUF.

    Raises:
        UserError: as `load_model`.
    """
    path = find_source(*base_of(source, revision))
    return path if path.is_dir() else None


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
        source, dtype, revision, **load: see `load_model`. A provider's base is read as it is recorded, and rounded to
            `dtype` when all is added.
        adapter: folder in PEFT's layout; None is the model alone.
        folder: where to; neither a source, nor in one, nor around one.
        form: "adapter" or "model"; returns and refuses as `export_adapter` or `export_model`.
        rank: see `export_adapter`.
        role: what the adapter is, where its folder does not say.
    """
    if form == "adapter" and adapter is None:
        raise UserError("no adapter to export: give its folder, or export the model")
    if form == "model" and rank is not None:
        raise UserError("a rank is for an adapter: a model has the adapter folded in")
    if rank is not None:
        require("rank", rank, RANK)
    folder, own = peft.as_folder(folder), find_folder(source, revision)
    # all that can be said before a model is loaded for nothing
    _require_apart(folder, [place for place in (source, adapter, own) if place is not None])
    require_replaceable(folder, form, _MARKS[form])
    if adapter is not None:
        lora.refuse_buffer(folder, peft.read_provenance(adapter).get("roles", [role or lora.UNKNOWN]))
    model, loaded = load_model(source, revision=revision, dtype=None if is_provider(source) else dtype, **load), None
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
        rank: the nearest adapter of this rank is written instead, see `adapters.diagnostics.best_rank`.

    Returns:
        "folder", "base", "fingerprint" (the base's), "roles", "rank" and, with a rank, "relative_error" (of all
        matrices together) and "worst_matrix" ("path", "layer", "relative_error").

    Raises:
        UserError: a Buffer (by its numbers too, where the model has a guard; a warning says where it has none), an
            adapter of unknown role or of another model, or a folder that cannot be written or holds something else.
    """
    folder = peft.as_folder(folder, "export_adapter(model, adapter, folder)")
    require_releasable(model, adapter, folder)
    require_replaceable(folder, "adapter", _MARKS["adapter"])
    loss = {}
    if rank is not None:
        adapter, figures = best_rank(adapter, rank)
        errors = [(e, path, layer) for path, each in figures["matrices"].items() for layer, e in enumerate(each)]
        worst = dict(zip(("relative_error", "path", "layer"), max(errors), strict=True))
        loss = {"relative_error": figures["relative_error"], "worst_matrix": worst}
    peft.save_adapter(folder, adapter, base_name=model.name, fingerprint=model.fingerprint, extra=loss)
    figures = {
        "folder": str(folder),
        "base": model.name,
        "fingerprint": model.fingerprint,
        "roles": list(adapter.roles),
    }
    return figures | {"rank": max(pair["a"].shape[-1] for pair in adapter.weights.values()), **loss}


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
    folder = peft.as_folder(folder, "export_model(model, adapter, folder)")
    require_model(model, folder)
    _require_apart(folder, [] if like is None else [like])
    dtype = dtype or model.dtype
    require_dtype(dtype)
    folded, rounding = model, {}
    if adapter is not None:
        folded = fold_adapter(model, adapter, model.name)
        rounding = {"unchanged_share": lora.unchanged_share(model.params, folded.params, adapter)}
    if model.guard is None:
        warn_unguarded(folder)
    else:
        for each in (model,) if adapter is None else (model, folded):  # either may hold half of a Buffer
            model.guard.refuse_model(folder, each.params)
    folded = cast_model(folded, dtype)
    write_hf(folder, folded.spec, folded.params, folded.tokenizer, like=like, stop_tokens=folded.stop_tokens)
    figures = {
        "folder": str(folder),
        "base": model.name,
        "fingerprint": fingerprint(folded.params, model.spec.to_json()),
    }
    figures |= {"roles": [] if adapter is None else list(adapter.roles), "dtype": dtype, "template": model.template}
    return figures | rounding


def _require_apart(folder: str | os.PathLike, sources: Iterable[str | os.PathLike]) -> None:
    """Raises a `UserError` where writing the folder could change what it is made from."""
    target = Path(folder).resolve()
    for source in map(Path, sources):
        place = source.resolve()
        if target == place or target in place.parents or place in target.parents:
            raise UserError(f"{folder}: is, is in or holds the source {source}: choose another place")
