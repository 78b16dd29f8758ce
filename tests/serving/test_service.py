"""From an inbox to an outbox: what comes out, and that nothing is lost or done twice."""

import dataclasses
import json
import os

import jax
import pytest
from served import LOOSE, ends, put, rows_of, serve, told

from br_jax import method
from br_jax.adapters import lora
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.adapters.peft import load_adapter
from br_jax.core.errors import UserError
from br_jax.core.io import LOCK_FILE, owned, reserved
from br_jax.data.rows import read_rows
from br_jax.serving import service as module
from br_jax.serving.inbox import Accepted, Inbox
from br_jax.serving.service import Service


def test_jobs_come_out_as_adapters_with_cards(provider, policy, tmp_path):
    put(tmp_path / "in", "a", rows_of(16))
    put(tmp_path / "in", "b", rows_of(11, "tell"), epochs=1, rank=2)
    status = serve(provider, tmp_path, policy)
    assert (status["released"], status["held"], status["waiting"]) == (2, 0, [])
    model, config = provider.model, policy.train
    rows = read_rows(tmp_path / "in/a.jsonl")
    kept = [row for i, row in enumerate(rows) if i not in module._held_back(rows, policy.count_held_back(len(rows)))]
    assert len(kept) == 13
    alone = method.train_user(model, kept, config, buffer=provider.buffer)
    card = json.loads((tmp_path / "out/a/card.json").read_text())
    merge = MergeConfig(**card["merge"])
    expected = qr_merge(alone, provider.reinforce, merge)
    found = load_adapter(tmp_path / "out/a/released", model.params, fingerprint=model.fingerprint)
    for x, y in zip(jax.tree.leaves(found.weights), jax.tree.leaves(expected.weights), strict=True):
        assert abs(x - y).max() < 1e-5
    assert found.roles == ("reinforce", "user") and card["released"] == lora.fingerprint(found)
    assert (card["training"]["rows"], card["gate"]["held_back"]["rows"]) == (13, 3)
    text = (tmp_path / "out/b/card.md").read_text()
    assert "settings of its own: epochs 1, rank 2" in text and "harmful canaries answered" in text
    assert told(tmp_path) == {name: ["received", "trained", "released"] for name in "ab"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if "service" not in str(path)}
    assert serve(provider, tmp_path, policy)["released"] == 2
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if "service" not in str(path)
    }
    assert told(tmp_path) == {name: ["received", "trained", "released"] for name in "ab"}


def test_nobody_else_may_read_what_is_the_services(provider, policy, tmp_path):
    put(tmp_path / "in", "a", rows_of(4), epochs=1)
    old = os.umask(0)
    try:
        serve(provider, tmp_path, policy)
    finally:
        os.umask(old)
    own = tmp_path / "out/.service"
    assert own.stat().st_mode & 0o777 == 0o700
    assert (own / "audit.jsonl").stat().st_mode & 0o777 == 0o600
    log = (own / "audit.jsonl").read_text() + (own / "status.json").read_text()
    assert "say" not in log and "it is" not in log  # no word of a user's


WRONG = {
    "empty": (b"", "no rows"),
    "text": (b"hello\n", "not valid JSON"),
    "mark": (b"\xef\xbb\xbf", "no rows"),
    "number": (b'{"prompt": 1, "response": "x"}\n', "'prompt' is int"),
    "object": (b'{"messages": {"role": "user"}}\n', "is no list of objects"),
    "latin": (b'{"prompt": "\xe4", "response": "y"}\n', "not UTF-8"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(range(200)), "not UTF-8"),
    "list": (b"[1]\n", "holds a JSON list"),
    "missing": (b'{"prompt": "x"}\n', "no 'response'"),
    "utf16": ('{"prompt": "x", "response": "y"}\n'.encode("utf-16"), "not UTF-8"),
    "half": (b'{"prompt": "\\ud800", "response": "y"}\n', "half a character"),
    "deep": (b'{"prompt": ' + b"[" * 3000 + b"\n", ""),
    "cut": (b'{"prompt": "x", "respo', "not valid JSON"),
    "nul": (b"\x00" * 50 + b"\n", "not valid JSON"),
    "nan": (b'{"prompt": NaN, "response": "x"}\n', ""),
    "many": (b'{"prompt": "x", "response": "y"}\n' * 31, "more than 30 rows"),
    "long": (json.dumps({"prompt": "x" * 5000, "response": "y"}).encode() + b"\n", "no row is left to train on"),
    "large": (b'{"prompt": "x", "response": "' + b"y" * 11_000 + b'"}\n', "10,000 are the most"),
    "tokens": (b'{"prompt": "x", "response": "yyyyyyyyyyyyyyyyyyyy"}\n' * 30, "in 2 epochs are too many, 1,000 are"),
    "tool": (b'{"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}\n', "roles of"),
}


def test_wrong_files_are_held_with_a_line_and_touch_nobody(provider, policy, tmp_path):
    (tmp_path / "in").mkdir()
    for name, (content, _) in WRONG.items():
        (tmp_path / f"in/{name}.jsonl").write_bytes(content)
    put(tmp_path / "in", "good", rows_of(4), epochs=1)
    put(tmp_path / "in", "asks", rows_of(4), epochs=9)
    os.mkfifo(tmp_path / "in/pipe.jsonl")
    status = serve(provider, tmp_path, policy)
    ended = {name.partition("+refused-")[0]: (name, how) for name, how in ends(tmp_path).items()}
    assert {name: how for name, (_, how) in ended.items()} == {"good": "released"} | dict.fromkeys(
        (*WRONG, "asks", "pipe"), "held"
    )
    for name, (_, said) in WRONG.items():
        (why,) = json.loads((tmp_path / "out" / ended[name][0] / "held.json").read_text())["why"]
        assert said in why and "\n" not in why and ".service" not in why, (name, why)
    assert status["held"] == len(WRONG) + 2
    for events in told(tmp_path).values():
        assert (events.count("held") + events.count("released")) == 1
    assert serve(provider, tmp_path, policy)["held"] == len(WRONG) + 2


def test_a_refused_file_that_is_corrected_is_a_job_and_a_job_stays_one_whatever_comes_under_its_name(
    provider, policy, tmp_path, monkeypatch
):
    put(tmp_path / "in", "a", rows_of(4), epochs=9)
    serve(provider, tmp_path, policy)
    put(tmp_path / "in", "a", rows_of(8), epochs=1)
    put(tmp_path / "in", "b", rows_of(8), epochs=2)
    (tmp_path / "in/b").write_text("no job, but of the same name")
    scan, changed = Inbox.scan, []

    def replaced(inbox, unfinished):
        if "b" in unfinished and not changed:
            changed.append(os.remove(tmp_path / "in/b.jsonl"))
            os.mkfifo(tmp_path / "in/b.jsonl")
        return scan(inbox, unfinished)

    monkeypatch.setattr(Inbox, "scan", replaced)
    assert serve(provider, tmp_path, policy)["released"] == 2 and changed
    found = ends(tmp_path)
    assert found.pop("a") == found.pop("b") == "released" and set(found.values()) == {"held"}
    assert sorted(name.partition("+")[0] for name in found) == ["a", "b", "b"]
    for name, events in told(tmp_path).items():
        assert events == (["held"] if "+" in name else ["received", "trained", "released"])


def test_lines_of_a_file_are_counted_as_its_sender_does(provider, policy, tmp_path):
    rows = [*rows_of(5), {"prompt": "x", "response": "<|im_start|> y" * 99}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    accepted = Accepted("a", 1, {}, tmp_path / "in/a.jsonl", "")
    read = [*module._Rows(accepted, policy, held_back=False), *module._Rows(accepted, policy, held_back=True)]
    assert sorted(row.origin for row in read) == [f"line {i}" for i in (1, 11, 3, 5, 7, 9)]


def test_a_rank_alone_leaves_an_adapters_scale(provider, policy, tmp_path):
    service = Service(provider, tmp_path / "in", tmp_path / "out", policy)
    jobs = [Accepted(f"job{rank}", rank, {"rank": rank}, tmp_path / "rows.jsonl", "") for rank in (1, 4)]
    for job, rank in zip(service._for_pool(jobs), (1, 4), strict=True):
        config = job.config(policy.train)
        assert (config.rank, config.alpha / config.rank) == (rank, policy.train.alpha / policy.train.rank)


def test_the_status_is_json(provider, policy, tmp_path):
    put(tmp_path / "in", "a", rows_of(4), epochs=2)
    seldom = dataclasses.replace(policy, train=dataclasses.replace(policy.train, log_every=9))
    service = Service(provider, tmp_path / "in", tmp_path / "out", seldom, once=True, settle=0.0)
    texts = [(tmp_path / "out/.service/status.json").read_text() for _ in service.run()]
    assert any('"loss": null' in text for text in texts) and not any("NaN" in text for text in texts)


def test_rows_that_were_held_back_and_are_wrong_stop_nobody(provider, policy, tmp_path, monkeypatch):
    """Nobody has read them before the gate."""
    monkeypatch.setattr(module, "_held_back", lambda rows, count: [*range(len(rows) - count, len(rows))])
    put(tmp_path / "in", "good", rows_of(10), epochs=1)
    put(tmp_path / "in", "long", rows_of(8) + [{"prompt": "x" * 600, "response": "y"}] * 2, epochs=1)
    serve(provider, tmp_path, policy)
    assert ends(tmp_path) == {"good": "released", "long": "held"}
    assert "held back: no row is left" in json.loads((tmp_path / "out/long/held.json").read_text())["why"][0]
    assert serve(provider, tmp_path, policy)["held"] == 1


def test_a_release_that_cannot_be_read_back_is_not_in_the_outbox(provider, policy, tmp_path, monkeypatch):
    put(tmp_path / "in", "a", rows_of(8), epochs=1)

    def cut(*args, **kwargs):
        raise UserError("adapter_model.safetensors: not a complete safetensors file")

    monkeypatch.setattr(module, "load_adapter", cut)
    assert serve(provider, tmp_path, policy)["held"] == 1
    assert sorted(os.listdir(tmp_path / "out/a")) == ["held.json"]


def test_what_the_gate_holds_back_does_not_leave(provider, policy, tmp_path, monkeypatch):
    strict = dataclasses.replace(policy, limits=dataclasses.replace(LOOSE, answered=0.0))
    put(tmp_path / "in", "a", rows_of(16))
    assert serve(provider, tmp_path, strict)["held"] == 1
    held = json.loads((tmp_path / "out/a/held.json").read_text())
    assert "harmful prompts are answered" in held["why"][0] and held["gate"]["answered"]["n"] == 2
    assert sorted(os.listdir(tmp_path / "out/a")) == ["held.json"]


def test_a_released_job_leaves_no_rows_here_and_a_held_one_what_there_is_to_look_at(
    provider, policy, tmp_path, monkeypatch
):
    put(tmp_path / "in", "a", rows_of(8), epochs=1)
    put(tmp_path / "in", "long", [{"prompt": "x" * 600, "response": "y"}] * 2, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(Inbox, "forget", lambda inbox, name: 1 / 0)  # killed between the log and this
        with pytest.raises(ZeroDivisionError):
            serve(provider, tmp_path, policy)
    jobs = tmp_path / "out/.service/jobs"
    assert (jobs / "a/rows.jsonl").exists() and (jobs / "a/user").exists()
    status = serve(provider, tmp_path, policy)
    assert (status["released"], status["held"]) == (1, 1)
    assert os.listdir(jobs / "a") == ["job.json"] and (jobs / "long/rows.jsonl").exists()
    assert serve(provider, tmp_path, policy)["released"] == 1  # the same file is no other job
    assert told(tmp_path)["a"] == ["received", "trained", "released"]


def test_an_adapter_that_looks_like_buffer_is_held_and_stops_nobody(provider, policy, tmp_path, monkeypatch):
    """Such as rows can make it that teach what Buffer knows."""
    put(tmp_path / "in", "a", rows_of(9), epochs=1)
    put(tmp_path / "in", "like", rows_of(10), epochs=1)
    trained = Service._trained

    def swapped(service, outcome):
        if outcome.name == "like":
            outcome = dataclasses.replace(outcome, adapter=provider.buffer.replace(roles=("user",)))
        trained(service, outcome)

    monkeypatch.setattr(Service, "_trained", swapped)
    serve(provider, tmp_path, policy)
    assert ends(tmp_path) == {"a": "released", "like": "held"}
    assert "like the provider's Buffer" in json.loads((tmp_path / "out/like/held.json").read_text())["why"][0]


def test_one_service_at_a_time(provider, policy, tmp_path):
    put(tmp_path / "in", "a", rows_of(4), epochs=1)
    for taken in (reserved(tmp_path / "in"), owned(tmp_path / "out/.service")):
        with taken, pytest.raises(UserError, match="works there"):
            serve(provider, tmp_path, policy)
    assert ends(tmp_path) == {}
    with pytest.raises(UserError, match="no such folder: make the inbox first"):
        serve(provider, tmp_path / "other", policy)


def test_nothing_in_the_inbox_is_written(provider, policy, tmp_path):
    """Also not by way of a link that a user has left there under a name that the service might use."""
    put(tmp_path / "in", "a", rows_of(4), epochs=1)
    secret = tmp_path / "provider.json"
    secret.write_text("the provider's")
    (tmp_path / "in" / LOCK_FILE).symlink_to(secret)
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    serve(provider, tmp_path, policy)
    assert secret.read_text() == "the provider's"
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def test_more_jobs_than_may_wait_stay_in_the_inbox(provider, policy, tmp_path):
    few = dataclasses.replace(policy, quotas=dataclasses.replace(policy.quotas, waiting=1))
    for i in range(2):
        put(tmp_path / "in", f"job{i}", rows_of(4), epochs=1)
    assert serve(provider, tmp_path, few)["released"] == 2


def test_many_files_are_taken_a_few_at_a_time(provider, policy, tmp_path):
    """Or nobody is trained, and no SIGTERM heard, while all are copied."""
    for i in range(20):
        put(tmp_path / "in", f"job{i}", rows_of(16), epochs=2)
    service = Service(provider, tmp_path / "in", tmp_path / "out", policy, once=True, settle=0.0).run()
    next(status for status in service if status["training"])
    service.close()
    assert 0 < len([*(tmp_path / "out/.service/jobs").glob("*/job.json")]) <= 2 * policy.slots
