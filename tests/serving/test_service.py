"""From an inbox to an outbox: what comes out, and that nothing is lost or done twice."""

import dataclasses
import json
import os

import jax
import pytest
from served import LOOSE, rows_of

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

LONG = {"prompt": "x" * 600, "response": "y"}


def test_jobs_come_out_as_adapters_with_cards_and_nobody_else_reads_or_writes(desk, provider, policy):
    """The inbox stays, also where a user has left a link under a name that the service might use."""
    desk.put("a", 16)
    desk.put("b", rows_of(11, "tell"), epochs=1, rank=2)
    secret = desk.folder / "provider.json"
    secret.write_text("the provider's")
    (desk.inbox / LOCK_FILE).symlink_to(secret)
    handed_in = {path.name: path.read_bytes() for path in desk.inbox.iterdir()}
    old = os.umask(0)
    try:
        status = desk.serve()
    finally:
        os.umask(old)
    assert (status["released"], status["held"], status["waiting"]) == (2, 0, [])
    assert {path.name: path.read_bytes() for path in desk.inbox.iterdir()} == handed_in
    assert [path.stat().st_mode & 0o777 for path in (desk.own, desk.own / "audit.jsonl")] == [0o700, 0o600]
    log = (desk.own / "audit.jsonl").read_text() + (desk.own / "status.json").read_text()
    assert "say" not in log and "it is" not in log  # no word of a user's
    model, rows = provider.model, read_rows(desk.inbox / "a.jsonl")
    held_back = module._held_back(rows, policy.count_held_back(len(rows)))
    kept = [row for i, row in enumerate(rows) if i not in held_back]
    assert len(kept) == 13
    alone = method.train_user(model, kept, policy.train, buffer=provider.buffer)
    card = json.loads((desk.outbox / "a/card.json").read_text())
    expected = qr_merge(alone, provider.reinforce, MergeConfig(**card["merge"]))
    found = load_adapter(desk.outbox / "a/released", model.params, fingerprint=model.fingerprint)
    for x, y in zip(jax.tree.leaves(found.weights), jax.tree.leaves(expected.weights), strict=True):
        assert abs(x - y).max() < 1e-5
    assert found.roles == ("reinforce", "user") and card["released"] == lora.fingerprint(found)
    assert (card["training"]["rows"], card["gate"]["held_back"]["rows"]) == (13, 3)
    text = (desk.outbox / "b/card.md").read_text()
    assert "settings of its own: epochs 1, rank 2" in text and "harmful canaries answered" in text

    def left():
        paths = [path for path in desk.outbox.rglob("*") if "service" not in str(path)]
        return desk.told(), {path: path.stat().st_mtime_ns for path in paths}

    before = left()
    assert before[0] == {name: ["received", "trained", "released"] for name in "ab"}
    assert desk.serve()["released"] == 2 and left() == before


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
    "half": (b'{"prompt": "\\ud800", "response": "y"}\n', "half a character"),
    "deep": (b'{"prompt": ' + b"[" * 3000 + b"\n", ""),
    "nul": (b"\x00" * 50 + b"\n", "not valid JSON"),
    "nan": (b'{"prompt": NaN, "response": "x"}\n', ""),
    "many": (b'{"prompt": "x", "response": "y"}\n' * 31, "more than 30 rows"),
    "long": (json.dumps({"prompt": "x" * 5000, "response": "y"}).encode() + b"\n", "no row is left to train on"),
    "large": (b'{"prompt": "x", "response": "' + b"y" * 11_000 + b'"}\n', "10,000 are the most"),
    "tokens": (b'{"prompt": "x", "response": "yyyyyyyyyyyyyyyyyyyy"}\n' * 30, "in 2 epochs are too many, 1,000 are"),
    "tool": (b'{"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}\n', "roles of"),
}


def test_wrong_files_are_held_with_a_line_and_touch_nobody(desk):
    for name, (content, _) in WRONG.items():
        (desk.inbox / f"{name}.jsonl").write_bytes(content)
    desk.put("good", 4, epochs=1)
    desk.put("asks", 4, epochs=9)
    os.mkfifo(desk.inbox / "pipe.jsonl")
    status = desk.serve()
    ended = {name.partition("+refused-")[0]: (name, how) for name, how in desk.ends().items()}
    held = dict.fromkeys((*WRONG, "asks", "pipe"), "held")
    assert {name: how for name, (_, how) in ended.items()} == {"good": "released"} | held
    for name, (_, said) in WRONG.items():
        why = desk.why(ended[name][0])
        assert said in why and "\n" not in why and ".service" not in why, (name, why)
    assert all(events.count("held") + events.count("released") == 1 for events in desk.told().values())
    assert status["held"] == desk.serve()["held"] == len(WRONG) + 2


def test_a_refused_file_that_is_corrected_is_a_job_and_a_job_stays_one_whatever_comes_under_its_name(desk, monkeypatch):
    desk.put("a", 4, epochs=9)
    desk.serve()
    desk.put("a", 8, epochs=1)
    desk.put("b", 8, epochs=2)
    (desk.inbox / "b").write_text("no job, but of the same name")
    scan, changed = Inbox.scan, []

    def replaced(inbox, unfinished):
        if "b" in unfinished and not changed:
            changed.append(os.remove(desk.inbox / "b.jsonl"))
            os.mkfifo(desk.inbox / "b.jsonl")
        return scan(inbox, unfinished)

    monkeypatch.setattr(Inbox, "scan", replaced)
    assert desk.serve()["released"] == 2 and changed
    assert sorted((name.partition("+")[0], how) for name, how in desk.ends().items()) == [
        ("a", "held"), ("a", "released"), ("b", "held"), ("b", "held"), ("b", "released"),
    ]  # fmt: skip
    for name, events in desk.told().items():
        assert events == (["held"] if "+" in name else ["received", "trained", "released"])


def test_lines_of_a_file_are_counted_as_its_sender_does(policy, tmp_path):
    rows = [*rows_of(5), {"prompt": "x", "response": "<|im_start|> y" * 99}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    accepted = Accepted("a", 1, {}, tmp_path / "a.jsonl", "")
    read = [*module._Rows(accepted, policy, held_back=False), *module._Rows(accepted, policy, held_back=True)]
    assert sorted(row.origin for row in read) == [f"line {i}" for i in (1, 11, 3, 5, 7, 9)]


def test_a_rank_alone_leaves_an_adapters_scale(desk, policy):
    jobs = [Accepted(f"job{rank}", rank, {"rank": rank}, desk.folder / "rows.jsonl", "") for rank in (1, 4)]
    for job, rank in zip(desk.service()._for_pool(jobs), (1, 4), strict=True):
        config = job.config(policy.train)
        assert (config.rank, config.alpha / config.rank) == (rank, policy.train.alpha / policy.train.rank)


def test_the_status_is_json(desk, policy):
    desk.put("a", 4, epochs=2)
    seldom = dataclasses.replace(policy, train=dataclasses.replace(policy.train, log_every=9))
    texts = [(desk.own / "status.json").read_text() for _ in desk.service(seldom).run()]
    assert any('"loss": null' in text for text in texts) and not any("NaN" in text for text in texts)


def test_whom_the_gate_cannot_let_out_stops_nobody(desk, provider, monkeypatch):
    """Held-back rows that nobody has read before; an adapter such as rows can make it that teach what Buffer knows."""
    monkeypatch.setattr(module, "_held_back", lambda rows, count: [*range(len(rows) - count, len(rows))])
    desk.put("good", 10, epochs=1)
    desk.put("long", rows_of(8) + [LONG] * 2, epochs=1)
    desk.put("like", 10, epochs=1)
    trained = Service._trained

    def swapped(service, outcome):
        if outcome.name == "like":
            outcome = dataclasses.replace(outcome, adapter=provider.buffer.replace(roles=("user",)))
        trained(service, outcome)

    monkeypatch.setattr(Service, "_trained", swapped)
    desk.serve()
    assert desk.ends() == {"good": "released", "long": "held", "like": "held"}
    assert "held back: no row is left" in desk.why("long") and "like the provider's Buffer" in desk.why("like")
    assert desk.serve()["held"] == 2


@pytest.mark.parametrize("why", ["cannot be read back", "harmful prompts are answered"])
def test_what_is_held_back_does_not_leave(desk, policy, monkeypatch, why):
    def cut(*args, **kwargs):
        raise UserError("adapter_model.safetensors: not a complete safetensors file")

    if why == "cannot be read back":
        monkeypatch.setattr(module, "load_adapter", cut)
    else:
        policy = dataclasses.replace(policy, limits=dataclasses.replace(LOOSE, answered=0.0))
    desk.put("a", 8, epochs=1)
    assert desk.serve(policy)["held"] == 1
    assert os.listdir(desk.outbox / "a") == ["held.json"]
    held = json.loads((desk.outbox / "a/held.json").read_text())
    if policy is not desk.policy:
        assert why in held["why"][0] and held["gate"]["answered"]["n"] == 2


def test_a_released_job_leaves_no_rows_here_and_a_held_one_what_there_is_to_look_at(desk, monkeypatch):
    desk.put("a", 8, epochs=1)
    desk.put("long", [LONG] * 2, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(Inbox, "forget", lambda inbox, name: 1 / 0)  # killed between the log and this
        with pytest.raises(ZeroDivisionError):
            desk.serve()
    jobs = desk.own / "jobs"
    assert (jobs / "a/rows.jsonl").exists() and (jobs / "a/user").exists()
    status = desk.serve()
    assert (status["released"], status["held"]) == (1, 1)
    assert os.listdir(jobs / "a") == ["job.json"] and (jobs / "long/rows.jsonl").exists()
    assert desk.serve()["released"] == 1  # the same file is no other job
    assert desk.told()["a"] == ["received", "trained", "released"]


def test_one_service_at_a_time_and_none_without_an_inbox(desk, provider, policy):
    desk.put("a", 4, epochs=1)
    for taken in (reserved(desk.inbox), owned(desk.own)):
        with taken, pytest.raises(UserError, match="works there"):
            desk.serve()
    assert desk.ends() == {}
    with pytest.raises(UserError, match="no such folder: make the inbox first"):
        list(Service(provider, desk.folder / "other", desk.outbox, policy, once=True).run())


def test_more_jobs_than_may_wait_stay_in_the_inbox(desk, policy):
    for i in range(2):
        desk.put(f"job{i}", 4, epochs=1)
    few = dataclasses.replace(policy, quotas=dataclasses.replace(policy.quotas, waiting=1))
    assert desk.serve(few)["released"] == 2


def test_many_files_are_taken_a_few_at_a_time(desk, policy):
    """Or nobody is trained, and no SIGTERM heard, while all are copied."""
    for i in range(20):
        desk.put(f"job{i}", 16, epochs=2)
    service = desk.service().run()
    next(status for status in service if status["training"])
    service.close()
    assert 0 < len([*desk.own.glob("jobs/*/job.json")]) <= 2 * policy.slots
