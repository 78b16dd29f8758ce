"""A provider's folder: what it records of the aligned base, and how that base is read back."""

import os
import pathlib

from jax.sharding import Mesh

from br_jax.adapters.peft import load_adapter
from br_jax.errors import UserError
from br_jax.files import read_json, write_json
from br_jax.models.io.hub import is_hub_name
from br_jax.models.io.load import find_source, read_model
from br_jax.models.model import Model, fold_adapter

PROVIDER_FILE = "provider.json"
_RECORDED, _PERHAPS = ("base", "template", "dtype", "fingerprint"), ("align", "revision")


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
            folded in.
        template: "chat" (the model's own) or "alpaca" (the paper's); a provider's folder brings its own.
        dtype: of the params, "float32" or "bfloat16"; None is float32, or what a provider's folder records.
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
    settings = {"template": record["template"], "dtype": dtype, "revision": record.get("revision")}
    model = raw = read_model(record["base"], mesh=mesh, matmul_precision=matmul_precision, **settings)
    if record.get("align"):
        adapter = load_adapter(folder / record["align"], raw.params, fingerprint=raw.fingerprint)
        model = fold_adapter(raw, adapter, f"{raw.name}-aligned")
    if dtype == record["dtype"] and model.fingerprint != wanted:
        raise UserError(
            f"{folder / PROVIDER_FILE}: the aligned base is {model.fingerprint[:12]}, recorded was {wanted[:12]}: "
            "make it again"
        )
    return model


def is_provider(source: str | os.PathLike) -> bool:
    """Whether a path is a provider's folder."""
    return (pathlib.Path(source) / PROVIDER_FILE).is_file()


def write_provider(
    folder: pathlib.Path, base: str, align: str | os.PathLike | None, model: Model, dtype: str, revision: str | None
) -> None:
    """Records an aligned base; paths, of the raw one (or its Hub name) and the align adapter, may be from `folder`."""
    record = {"base": base, "revision": revision, "align": align and str(align), "template": model.template}
    write_json(folder / PROVIDER_FILE, record | {"dtype": dtype, "fingerprint": model.fingerprint})


def read_provider(folder: pathlib.Path) -> dict:
    """What provider.json records, with its "base" as a path or a Hub name that can be loaded from anywhere.

    Raises:
        UserError: the file is damaged, or no such record.
    """
    record = read_json(folder / PROVIDER_FILE, "make the folder again")
    wrong = [name for name in _RECORDED if not isinstance(record.get(name), str)]
    if wrong := wrong or [name for name in _PERHAPS if not isinstance(record.get(name), str | None)]:
        raise UserError(f"{folder / PROVIDER_FILE}: not a provider's record ({wrong[0]} is no text): make it again")
    source = record["base"]
    base = source if is_hub_name(source) and not (folder / source).exists() else str(folder / source)
    return record | {"base": base}


def find_folder(source: str | os.PathLike, revision: str | None = None) -> pathlib.Path | None:
    """The Hugging Face folder that the weights of a source come from, through a provider's folder too; None for GGUF.

    Raises:
        UserError: as `load_model`.
    """
    if is_provider(source):
        record = read_provider(pathlib.Path(source))
        source, revision = record["base"], record.get("revision")
    path = find_source(source, revision)
    return path if path.is_dir() else None
