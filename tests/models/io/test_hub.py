"""Models by name against a Hub of our own on this machine, which speaks huggingface_hub's protocol."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from br_jax.core.errors import UserError
from br_jax.models.io.hf import write_hf
from br_jax.models.io.load import is_hub_name
from br_jax.provider import load_model

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
