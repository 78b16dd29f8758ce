"""What can happen to a file that a run has finished with."""

import json

from safetensors.numpy import load_file, save_file


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def _flip(path):
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


TAMPER = {
    "a bit": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}
