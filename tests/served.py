"""A service on two folders: what is handed in, and what comes out."""

import json

from br_jax.serving.policy import Limits
from br_jax.serving.reports import Audit
from br_jax.serving.service import Service

# Of the tiny model, which refuses nothing and often loops, so that what a user learns may not count.
LOOSE = Limits(answered=1.0, over_refused=1.0, degenerate=1.0, kept=0.0)


def rows_of(count, word="say"):
    return [{"prompt": f"{word} {i}?", "response": f"it is {i * 7}"} for i in range(count)]


class Desk:
    """A folder with an inbox, in/, and an outbox, out/."""

    def __init__(self, provider, policy, folder):
        self.provider, self.policy, self.folder = provider, policy, folder
        self.inbox, self.outbox, self.own = folder / "in", folder / "out", folder / "out/.service"
        self.inbox.mkdir()

    def put(self, name, rows, **settings):
        """Hands a job in: its rows, or how many."""
        rows = rows_of(rows) if isinstance(rows, int) else rows
        if settings:
            (self.inbox / f"{name}.json").write_text(json.dumps(settings))
        (self.inbox / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def service(self, policy=None, **settings):
        settings = {"once": True, "settle": 0.0, **settings}
        return Service(self.provider, self.inbox, self.outbox, policy or self.policy, **settings)

    def serve(self, policy=None, **settings):
        """Serves once; returns the last status."""
        return [*self.service(policy, **settings).run()][-1]

    def ends(self):
        """{job: how it ended} by the outbox."""
        places = [place for place in self.outbox.iterdir() if not place.name.startswith(".")]
        return {place.name: "held" if (place / "held.json").exists() else "released" for place in places}

    def why(self, name):
        """The one line that says why a job was held."""
        (why,) = json.loads((self.outbox / name / "held.json").read_text())["why"]
        return why

    def told(self):
        """{job: its events} by the log."""
        audit, events = Audit(self.own / "audit.jsonl"), {}
        audit.close()
        for entry in audit.entries:
            events.setdefault(entry["job"], []).append(entry["event"])
        return events

    def hashes(self):
        """{job: what was released}."""
        cards = self.outbox.glob("*/card.json")
        return {place.parent.name: json.loads(place.read_text())["released"] for place in cards}
