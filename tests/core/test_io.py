"""What is no file, too large a file, text that is none; writing; errors. How readers use it: fuzz/test_readers."""

import contextlib
import errno
import io
import os
import pickle
import socket

import pytest

from br_jax.core import io as files
from br_jax.core.errors import UserError, explain, is_machine_fault
from br_jax.core.io import (
    json_lines,
    open_file,
    parse_json,
    read_bytes,
    read_json,
    read_jsonl,
    read_text,
    staged,
    text_lines,
    write_text,
)  # fmt: skip
from br_jax.data.rows import read_rows

pytestmark = pytest.mark.timeout(60)  # a pipe would be waited for, a device read, for ever


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "loop", "nothing"])
def test_what_is_no_file_is_not_read(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    other = {"loop": "cannot be read", "nothing": "no such file"}
    with socket.socket(socket.AF_UNIX) as end:
        make = {"folder": os.mkdir, "pipe": os.mkfifo, "socket": end.bind, "nothing": lambda name: None}
        make.get(kind, lambda name: os.symlink("/dev/zero" if kind == "device" else "x", name))("x")
    for read in (read_bytes, read_text, read_json, read_jsonl):
        if read is read_jsonl and kind in other:
            assert read("x") == []
            continue
        with pytest.raises(UserError, match=f"^x: {other.get(kind, f'cannot be read .it is a {kind}, not a file')}"):
            read("x")


def test_a_link_to_a_file_is_one(tmp_path):
    """As all files are in the Hub's cache."""
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to("blob")
    assert read_json(tmp_path / "link") == {"a": 1}


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(files, "require_file", lambda *_: None)  # it was a file when that was asked
    assert read_bytes(tmp_path / "x") == b""


def test_a_file_has_so_many_bytes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"1234")
    assert read_text(path, 4) == "1234" and read_bytes(path, None) == b"1234"
    for read in (read_bytes, read_text, lambda path, most: open_file(path, most).__enter__()):
        with pytest.raises(UserError, match="x: 4 bytes are too many, 3 are the most: "):
            read(path, 3)
    (rows := tmp_path / "rows").write_text('{"prompt": "a", "response": "b"}')
    assert len(read_rows(rows, max_bytes=32)) == 1
    with pytest.raises(UserError, match="rows: 32 bytes are too many, 31 are the most: split it, or raise max_bytes"):
        read_rows(rows, max_bytes=31)
    os.truncate(path, 1 << 36)  # none of which are on the disk
    for read in (read_bytes, read_text, read_json, read_jsonl):
        with pytest.raises(UserError, match="68,719,476,736 bytes are too many"):
            read(path)


def test_the_flag_raises_every_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON", 10)
    (path := tmp_path / "x").write_bytes(b"a" * 20)
    reads = (lambda: read_bytes(path, 10), lambda: list(text_lines(io.BytesIO(b"a" * 20), "x")))
    for read in reads:
        with pytest.raises(UserError, match=r"the most: .*\(scripts: --max_file_mb\)|in a line.*--max_file_mb"):
            read()
    monkeypatch.setattr(files, "_raised", 0)  # as it was, after the test
    files.raise_limits(20)
    for read in reads:
        assert read()
    with pytest.raises(UserError, match="x:1: more than 20 bytes in a line"):
        list(text_lines(io.BytesIO(b"a" * 21), "x"))


def test_a_line_has_so_many_bytes_and_is_one_of_the_whole_text(monkeypatch):
    content = "\ufeff{}\n\u2028 naïve\x85\r\n".encode()
    assert "".join(text_lines(io.BytesIO(content), "x")) == content.decode("utf-8-sig")
    with pytest.raises(UserError, match=r"x: not UTF-8 \(byte 5\): save it as UTF-8"):
        list(text_lines(io.BytesIO(b"{}\r\na\xff\n"), "x"))
    monkeypatch.setattr(files, "MAX_JSON", 10)
    lines = ["a\r\n", "naïveté\n", "\n", "1234567890"]
    assert list(text_lines(io.BytesIO("".join(lines).encode()), "x")) == lines
    with pytest.raises(UserError, match="x:2: more than 10 bytes in a line, or"):
        list(text_lines(io.BytesIO(b"a\n12345678901\n"), "x"))
    monkeypatch.setattr(files, "_MAX_NUMBER", 2)
    with pytest.raises(UserError, match="x:3: more than 10 bytes in a line, or 2 lines; split it"):
        list(text_lines(io.BytesIO(b"\n\n\n"), "x"))


def test_json_is_as_deep_and_has_a_key_once():
    """What walks over it, `repr` for one, may be recursive."""
    shallow, deep = ('[{"a":' * n + "1" + "}]" * n for n in (49, 51))
    assert parse_json(shallow, "x", "")
    with pytest.raises(UserError, match=r"x: not valid JSON \(more than 100 levels deep\); mend it"):
        parse_json(deep, "x", "mend it")
    with pytest.raises(UserError, match=r"x:2: not valid JSON \(more than 100 levels deep\); write one"):
        list(json_lines(io.BytesIO(b'{"a": 1}\n{"a": ' + deep.encode() + b"}"), "x"))
    for text in ('{"a": 1, "a": 2}', '{"b": [{"a": 1, "a": 1}]}'):
        with pytest.raises(UserError, match=r"x:2: not valid JSON \(key 'a' twice\); mend it"):
            parse_json(text, "x:2", "mend it")


def test_the_header_of_a_safetensors_file_is_no_larger(tmp_path):
    """A header of millions of empty tensors takes ten times its size in memory."""
    path = tmp_path / "x.safetensors"
    path.write_bytes((20_000_000).to_bytes(8, "little") + b" " * 20_000_000)
    with pytest.raises(UserError, match=r"not a complete safetensors file \(a header of 20,000,000 bytes\)"):
        files.safetensors_header(path)


@pytest.mark.parametrize("write", ["text", "folder"])
def test_what_is_written_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch, write):
    """Or a power failure leaves an empty file under it; and the name is on disk when the writer returns."""
    events = []

    def note(name, function):
        def call(*args):
            events.append((name, os.readlink(f"/proc/self/fd/{args[0]}") if name == "sync" else ""))
            return function(*args)

        return call

    for name, attribute in (("sync", "fsync"), ("name", "replace"), ("name", "rename")):
        monkeypatch.setattr(os, attribute, note(name, getattr(os, attribute)))
    if write == "text":
        write_text(tmp_path / "a", "b")
    else:
        with staged(tmp_path / "a") as new:
            (new / "inner").mkdir()
            (new / "inner" / "b").write_text("c")
    named = events.index(("name", ""))
    before, after = [path for _, path in events[:named]], [path for _, path in events[named + 1 :]]
    assert after == [str(tmp_path)]
    assert [os.path.basename(path) for path in before] == (
        [f".a.{os.getpid()}.tmp"] if write == "text" else ["new", "inner", "b"]
    )


@pytest.mark.parametrize(("number", "raised"), [(errno.EINVAL, False), (errno.ENOSPC, True)])
def test_a_file_system_that_cannot_sync(tmp_path, monkeypatch, number, raised):
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(number, "no")))
    with pytest.raises(OSError) if raised else contextlib.nullcontext() as caught:
        write_text(tmp_path / "a", "b")
    assert not raised or explain(caught.value) == f"{tmp_path / 'a'}: no: free space, or choose another place"
    assert (tmp_path / "a").exists() != raised


def test_whose_fault_an_error_is():
    for error, fault in ((OSError(errno.ENOSPC, ""), True), (OSError(errno.EACCES, ""), False), (None, False)):
        outer, between = UserError("x"), UserError("y")
        outer.__cause__, between.__cause__ = between, error
        assert is_machine_fault(outer) == fault


def test_what_can_be_mended_is_one_line_and_a_bug_is_none():
    for error, line in (
        (UserError("x:3: no"), "x:3: no"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a\nb"), "a?b: No such file: check the path"),
        (PermissionError(errno.EACCES, "Denied", "x"), "x: Denied: check its permissions, or choose another place"),
        (OSError(errno.ENOSPC, "No space left"), "No space left: free space, or choose another place"),
        (OSError("a bug"), None),
        (ValueError("a bug"), None),
    ):
        assert explain(error) == line


def test_a_message_is_one_line_that_no_terminal_obeys():
    error = UserError("a\nb\r\x1b[31mc\u2028\ud800d\x00: é and 🙂 stay")
    assert str(error) == "a?b??[31mc??d?: é and 🙂 stay" and str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_long_message_keeps_its_beginning_and_its_end():
    error = UserError(f"file: {'x' * 10**6}: mend it")
    assert len(str(error)) == 800 and str(error).startswith("file: x") and str(error).endswith("x: mend it")
    assert str(UserError("x" * 800)) == "x" * 800


def test_a_folder_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    """Also where the second of two renames fails, and where a kill comes between them."""
    folder, rename = tmp_path / "a", os.rename

    def write(content):
        with staged(folder) as new:
            (new / "file").write_text(content)

    def fail(source, target):
        if os.path.basename(source) == "new":
            raise OSError(errno.EIO, "broken", str(target))
        rename(source, target)

    write("first")
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="broken"):
        write("second")
    assert (folder / "file").read_text() == "first" and [*tmp_path.iterdir()] == [folder]
    monkeypatch.undo()
    (killed := tmp_path / ".a-killed").mkdir()
    rename(folder, killed / "old")
    with pytest.raises(KeyboardInterrupt), staged(folder):
        raise KeyboardInterrupt
    assert (folder / "file").read_text() == "first" and [*tmp_path.iterdir()] == [folder]


def test_a_number_is_no_path():
    with pytest.raises(UserError, match="0 is a number, not a path"):
        read_bytes(0)
    with pytest.raises(UserError, match=r"a.b: cannot be read"):
        read_bytes("a\0b")
