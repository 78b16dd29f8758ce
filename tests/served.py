"""A service on two folders: what is handed in, and what comes out."""

import json

from br_jax.serving.policy import Limits
from br_jax.serving.reports import Audit
from br_jax.serving.service import Service

# Of the tiny model, which refuses nothing and often loops, so that what a user learns may not count.
LOOSE = Limits(answered=1.0, over_refused=1.0, degenerate=1.0, kept=0.0)


def rows_of(count, word="say"):
    return [{"prompt": f"{word} {i}?", "response": f"it is {i * 7}"} for i in range(count)]


def put(folder, name, rows, **settings):
    folder.mkdir(exist_ok=True)
    if settings:
        (folder / f"{name}.json").write_text(json.dumps(settings))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def serve(provider, folder, policy, **settings):
    """Serves once; returns the last status."""
    service = Service(provider, folder / "in", folder / "out", policy, **{"once": True, "settle": 0.0, **settings})
    return [*service.run()][-1]


def ends(folder):
    """{job: how it ended} by the outbox."""
    outbox = folder / "out"
    return {
        place.name: "held" if (place / "held.json").exists() else "released"
        for place in outbox.iterdir()
        if not place.name.startswith(".")
    }


def told(folder):
    """{job: its events} by the log."""
    audit, events = Audit(folder / "out/.service/audit.jsonl"), {}
    audit.close()
    for entry in audit.entries:
        events.setdefault(entry["job"], []).append(entry["event"])
    return events


def hashes(folder):
    cards = (folder / "out").glob("*/card.json")
    return {place.parent.name: json.loads(place.read_text())["released"] for place in cards}
