"""`load_model`: every kind of source, a Hub of our own on this machine, and a provider's folder."""

import dataclasses
import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.adapters.peft import save_adapter
from br_jax.core.errors import UserError
from br_jax.core.mesh import make_mesh, shardings
from br_jax.core.records import fingerprint
from br_jax.models.io import hf
from br_jax.models.io.hf import Stored, load_params, unstack_tensors, write_hf
from br_jax.models.io.load import is_hub_name
from br_jax.models.model import fold_adapter
from br_jax.provider import PROVIDER_FILE, load_model


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain") / "model"
    write_hf(folder, tiny.spec, jax.device_get(tiny.params), tiny.tokenizer)
    return folder


@pytest.fixture(scope="module")
def raw(folder):
    return load_model(folder)


@pytest.fixture
def provider(folder, raw, make_adapter, tmp_path):
    """provider(**record) -> a provider's folder; its align adapter lies beside."""
    align = make_adapter("align")
    save_adapter(tmp_path / "align" / "adapter", align, base_name=raw.name, fingerprint=raw.fingerprint)
    said = {"base": str(folder), "align": "align/adapter", "template": "alpaca", "dtype": "float32"}

    def make(**record):
        record = said | {"fingerprint": fold_adapter(raw, align, "x").fingerprint} | record
        (tmp_path / PROVIDER_FILE).write_text(json.dumps(record))
        return tmp_path

    return make


def test_a_folder_is_the_model_and_a_fingerprint_sees_every_bit(raw, tiny):
    jax.tree.map(np.testing.assert_array_equal, raw.params, tiny.params)
    assert (raw.fingerprint, raw.spec, raw.template, raw.name) == (tiny.fingerprint, tiny.spec, "chat", "model")
    kernel, other = tiny.params["layers"]["mlp"]["up"]["kernel"], jax.tree.map(lambda leaf: leaf, tiny.params)
    other["layers"]["mlp"]["up"]["kernel"] = kernel.at[1, 2, 3].set(jnp.nextafter(kernel[1, 2, 3], jnp.float32(9)))
    changed = dataclasses.replace(tiny, params=other)
    assert fingerprint(changed.params, tiny.spec.to_json()) != tiny.fingerprint
    assert fingerprint(tiny.params, tiny.spec.to_json()) == tiny.fingerprint


def test_a_provider_s_folder_gives_the_aligned_base(provider, raw, make_adapter):
    model, align = load_model(provider()), make_adapter("align")
    assert model.name == "model-aligned" and model.template == "alpaca"
    for path, pair in align.weights.items():
        group, name = path.split("/")[1:]
        kernel = np.float64(raw.params["layers"][group][name]["kernel"])
        delta = float(align.scale) * np.einsum("lir,lro->lio", np.float64(pair["a"]), np.float64(pair["b"]))
        np.testing.assert_allclose(model.params["layers"][group][name]["kernel"], kernel + delta, rtol=1e-5, atol=1e-6)
    keys = [each.params["layers"]["attn"]["k"]["kernel"] for each in (model, raw)]
    np.testing.assert_array_equal(*keys)
    assert load_model(provider(align=None, fingerprint=raw.fingerprint)).fingerprint == raw.fingerprint
    with pytest.raises(UserError, match="recorded was ffffffffffff"):
        load_model(provider(fingerprint="f" * 64))


def test_a_wrong_source_or_record_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^template 'chatt'; near: chat$"):  # before anything is read
        load_model(tmp_path / "nowhere", template="chatt")
    (tmp_path / "junk.gguf").write_bytes(b"junk" * 100)
    cases = [
        ("nowhere", "", "float32", "nowhere: no such model"),
        ("junk.gguf", "", "float32", r"junk\.gguf"),
        ("junk.gguf", "", "float16", "'float16': use float32 or bfloat16"),
        ("", "not json", "float32", f"{PROVIDER_FILE}.*not valid JSON.*make the folder again"),
        ("", "{}", "float32", f"{PROVIDER_FILE}.*provider.s record .base is no text"),
    ]
    for name, record, dtype, message in cases:
        (tmp_path / PROVIDER_FILE).write_text(record)
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / name, dtype=dtype)
    for source in ({"base": "x"}, None, "a\0b"):
        with pytest.raises(UserError, match="is neither a path nor a model's name") as caught:
            load_model(source)
        assert "\n" not in str(caught.value)


def test_a_mesh_gets_the_same_weights_each_device_its_part(folder, raw):
    mesh = make_mesh(2, 2, 2)
    split = load_model(folder, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, split.params, raw.params)
    assert split.fingerprint == raw.fingerprint
    for leaf, place in zip(*map(jax.tree.leaves, (split.params, shardings(split.params, mesh))), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_a_device_s_part_alone_is_read(raw):
    """Each of 8 devices asks for an eighth of each split tensor; together for each byte once."""
    asked, mesh = {}, make_mesh(1, 8)

    class Recorded:
        def __init__(self, name, array):
            self.name, self.array = name, array

        def __getitem__(self, index):
            part = self.array[index]
            asked[self.name] = asked.get(self.name, 0) + part.size
            return part

    names = hf.tensor_names(raw.spec)
    arrays = {name: tensor.fetch() for name, tensor in unstack_tensors(raw.spec, names, raw.params).items()}
    tensors = {n: Stored(each.shape, "memory", functools.partial(Recorded, n, each)) for n, each in arrays.items()}
    params = load_params(raw.spec, names, tensors, "memory", jnp.dtype("float32"), mesh)
    jax.tree.map(np.testing.assert_array_equal, params, raw.params)
    assert asked == {name: array.size for name, array in arrays.items()}


COMMIT = "c0ffee" + "0" * 34
# What a user meets; each case is a name and a revision.
SCRIPT = """
import json, os, sys
from br_jax.core.errors import UserError
from br_jax.models.io.load import read_spec
from br_jax.provider import load_model
for name, revision in json.loads(sys.argv[1]):
    try:
        model = load_model(name, revision=revision)
        print(json.dumps([model.name, model.fingerprint, read_spec(name, revision).num_layers]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def hub(tiny, tmp_path_factory):
    """(address, requested paths, the folder that is served as acme/tiny); acme/gated is for others."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    write_hf(folder, tiny.spec, tiny.params, tiny.tokenizer)
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    asked, held = [], sorted(folder.iterdir())

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            parts = self.path.split("?")[0].strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            owner, kind, what, revision, name = [*(parts[2:] if api else parts), *[""] * 5][:5]
            if (owner, kind) != ("acme", "tiny"):
                code, said = (403, "GatedRepo") if kind == "gated" else (404, "RepoNotFound")
                return self.answer(code, b"{}", {"X-Error-Code": said})
            if revision not in ("", "main", COMMIT):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if api:
                files = [{"type": "file", "path": f.name, "rfilename": f.name, "size": 1, "oid": "0"} for f in held]
                said = files if what == "tree" else {"id": "acme/tiny", "sha": COMMIT, "siblings": files}
                return self.answer(200, json.dumps(said).encode(), {})
            if not (folder / name).is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content = (folder / name).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def answer(self, code, content, headers):
            self.send_response(code)
            for key, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked, folder
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_name_is_fetched_once_and_then_works_offline(hub, tiny, tmp_path):
    address, asked, folder = hub

    def ask(*cases, offline):
        """In a process of its own: huggingface_hub reads its settings at import."""
        environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": offline}
        command = [sys.executable, "-c", SCRIPT, json.dumps(cases)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    model, absent = ("acme/tiny", None), ("acme/nothing", None)
    found, revision, gated, nothing = ask(model, ("acme/tiny", "v9"), ("acme/gated", None), absent, offline="0")
    assert found == ["tiny", load_model(folder).fingerprint, tiny.spec.num_layers]
    assert not any("pytorch_model.bin" in path for path in asked)
    assert revision.startswith("acme/tiny@v9: the model has no such revision")
    assert "gated by its makers: ask for access at https://huggingface.co/acme/gated" in gated
    assert nothing.startswith("acme/nothing: neither a path nor a model on the Hub")
    count = len(asked)
    again, nothing = ask(model, absent, offline="1")
    assert again == found and len(asked) == count, "offline, and the network was used"
    assert "no path here, not in the cache, and the Hub cannot be reached" in nothing and "\n" not in nothing


def test_what_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("Qwen/Qwen3-4B-Instruct-2507") and is_hub_name("meta-llama/Meta-Llama-3-8B")
    for other in ("model", "./a/b", "/a/b", "a/b/c", "../a", "a/../b", "data/model.gguf", "a//b", "https://x/y"):
        assert not is_hub_name(other), other
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not is_hub_name("a/b"), "a folder that is there"
    with pytest.raises(UserError, match="a/c: no path here, not in the cache"):
        load_model("a/c")
