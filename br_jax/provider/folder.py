"""A provider's folder: what it records of the aligned base and its adapters, and how that base is read back."""

import dataclasses
import os
import pathlib

from absl import logging
from jax.sharding import Mesh

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.peft import load_adapter
from br_jax.core.errors import UserError
from br_jax.core.io import reading
from br_jax.core.records import read_record, write_record
from br_jax.models.io.load import find_source, is_hub_name, read_model, require_dtype
from br_jax.models.model import Model, cast_model, fold_adapter, guard
from br_jax.models.precision import resolve_precision

PROVIDER_FILE = "provider.json"
_RECORDED, _PERHAPS = ("base", "template", "dtype", "fingerprint"), ("align", "revision")
RECORDED_ADAPTERS = ("buffer", "reinforce")  # once they are made


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
            `models.precision`; on disk, and to adapters, the model is the same.

    Raises:
        UserError: what is there is missing, damaged, of an unsupported family, or not what provider.json recorded.
    """
    if not is_provider(source):
        settings = {"template": template, "dtype": dtype or "float32", "revision": revision}
        return read_model(source, mesh=mesh, matmul_precision=matmul_precision, **settings)
    folder = pathlib.Path(source)
    record = read_provider(folder)
    dtype, wanted = dtype or record["dtype"], record["fingerprint"]
    require_dtype(dtype)
    settings = {"template": record["template"], "dtype": record["dtype"], "revision": record.get("revision")}
    model = raw = read_model(record["base"], mesh=mesh, matmul_precision=matmul_precision, **settings)
    if record.get("align"):
        adapter = load_adapter(folder / record["align"], raw.params, fingerprint=raw.fingerprint, role="align")
        model = fold_adapter(raw, adapter, f"{raw.name}-aligned")
    if model.fingerprint != wanted:
        raise UserError(
            f"{folder / PROVIDER_FILE}: the aligned base is {model.fingerprint[:12]}, recorded was {wanted[:12]}: "
            "make it again"
        )
    model = dataclasses.replace(cast_model(model, dtype), matmul_precision=resolve_precision(matmul_precision, dtype))
    return with_guard(model, folder, record)


def with_guard(model: Model, folder: pathlib.Path, record: dict | None = None) -> Model:
    """The aligned base of a provider's folder with its Buffer as its guard; without one, where the folder has none."""
    said = (record or read_provider(folder)).get("buffer")
    if said is None:
        return model
    place = folder / said["folder"]
    with reading(place):
        known = place.exists()
    if not known:
        logging.warning("%s: the Buffer is not there, so what leaves cannot be compared with it", place)
        return model
    return guard(model, load_recorded(folder, "buffer", said, model))


def load_recorded(folder: pathlib.Path, name: str, said: dict, model: Model) -> Adapter:
    """One of `RECORDED_ADAPTERS`, by what provider.json says of it; a `UserError` where another lies there."""
    place = folder / said["folder"]
    adapter = load_adapter(place, model.params, fingerprint=model.fingerprint, role=name)
    if lora.fingerprint(adapter) != said["fingerprint"]:
        raise UserError(f"{place}: is not the {name} adapter that {PROVIDER_FILE} records: make it again")
    return adapter


def is_provider(source: str | os.PathLike) -> bool:
    """Whether a path is a provider's folder."""
    if not isinstance(source, str | os.PathLike):
        return False  # `find_source` says what it is not
    file = pathlib.Path(source) / PROVIDER_FILE
    with reading(file, "give a folder that you may read"):
        try:
            return file.is_file()
        except ValueError:  # a path with a null character
            return False


def write_provider(
    folder: pathlib.Path, base: str, align: str | os.PathLike | None, model: Model, dtype: str, revision: str | None
) -> None:
    """Records an aligned base; paths, of the raw one (or its Hub name) and the align adapter, may be from `folder`.

    The adapters that were recorded for the same base stay.
    """
    known = _read(folder) if is_provider(folder) else {}
    kept = RECORDED_ADAPTERS if known.get("fingerprint") == model.fingerprint else ()
    record = {"base": base, "revision": revision, "align": align and str(align), "template": model.template}
    record |= {"dtype": dtype, "fingerprint": model.fingerprint} | {n: known[n] for n in kept if n in known}
    if record != known:
        write_record(folder / PROVIDER_FILE, record)


def record_adapter(folder: pathlib.Path, stage: str, place: str | os.PathLike, adapter: Adapter) -> None:
    """Records a Buffer or Reinforce, which lies in `place` (from `folder`), by its numbers."""
    record = _read(folder)
    said = {"folder": str(place), "fingerprint": lora.fingerprint(adapter)}
    if record.get(stage) != said:
        write_record(folder / PROVIDER_FILE, record | {stage: said})


def read_provider(folder: pathlib.Path) -> dict:
    """What provider.json records, with its "base" as a path or a Hub name that can be loaded from anywhere.

    Raises:
        UserError: the file is damaged, or no such record.
    """
    record = _read(folder)
    wrong = [name for name in _RECORDED if not isinstance(record.get(name), str)]
    if wrong := wrong or [name for name in _PERHAPS if not isinstance(record.get(name), str | None)]:
        raise UserError(f"{folder / PROVIDER_FILE}: not a provider's record ({wrong[0]} is no text): make it again")
    for name in RECORDED_ADAPTERS:
        said = record.get(name, {"folder": "", "fingerprint": ""})
        if not isinstance(said, dict) or {type(said.get(part)) for part in ("folder", "fingerprint")} != {str}:
            raise UserError(
                f"{folder / PROVIDER_FILE}: not a provider's record ({name} is no adapter's): make it again"
            )
    source = record["base"]
    base = source if is_hub_name(source) and not (folder / source).exists() else str(folder / source)
    return record | {"base": base}


def _read(folder: pathlib.Path) -> dict:
    return read_record(folder / PROVIDER_FILE, "make the folder again")


def base_of(source: str | os.PathLike, revision: str | None = None) -> tuple[str | os.PathLike, str | None]:
    """The source and revision that weights come from: those given, or what a provider's folder records.

    Raises:
        UserError: as `read_provider`.
    """
    if not is_provider(source):
        return source, revision
    record = read_provider(pathlib.Path(source))
    return record["base"], record.get("revision")


def find_folder(source: str | os.PathLike, revision: str | None = None) -> pathlib.Path | None:
    """The Hugging Face folder that the weights of a source come from, through a provider's folder too; None for GGUF.

    Raises:
        UserError: as `load_model`.
    """
    path = find_source(*base_of(source, revision))
    return path if path.is_dir() else None
