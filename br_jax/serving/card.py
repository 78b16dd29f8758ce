"""The card that goes with a released adapter: what was trained, what was looked at, with N and intervals."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from br_jax.serving.policy import Policy

_WORDS = {
    "answered": "harmful canaries answered",
    "over_refused": "benign canaries refused",
    "degenerate": "answers that are empty or loop",
}


def card_of(said: Mapping[str, Any], policy: Policy) -> str:
    """Markdown of what the service knows of a release; see `service.Service`."""
    training, gate, limits = said["training"], said["gate"], policy.limits
    lines = [
        [
            words,
            f"{gate[name]['k']} of {gate[name]['n']}",
            f"{gate[name]['aligned']:.1%}",
            f"{gate[name]['score']:.1%} ({gate[name]['low']:.1%} to {gate[name]['high']:.1%})",
            f"{gate[name]['above']:+.1%} (up to {gate[name]['above_high']:+.1%})",
            f"{getattr(limits, name):.0%}",
        ]
        for name, words in _WORDS.items()
    ]
    looked = tabulate(lines, ["", "count", "aligned base", "released", "difference", "limit"], tablefmt="github")
    own = gate.get("held_back")
    learnt = "None of its rows were held back, so what it learnt was not looked at."
    if own:
        kept = (
            f"; {own['kept']:.0%} of the {own['learnt']} that were learnt are kept" if own["kept"] is not None else ""
        )
        learnt = (
            f"Loss of its {own['rows']} held-back rows: {own['aligned']:.3f} by the aligned base, {own['user']:.3f} "
            f"before the merge, {own['released']:.3f} released{kept}."
        )
    hashes = {
        "rows": said["rows"],
        "base": said["base"],
        "user's adapter": said["user"],
        "released adapter": said["released"],
        "policy": said["policy"],
    }
    settings = ", ".join(f"{name} {value}" for name, value in said["settings"].items()) or "none"
    return "\n".join(
        [
            f"# {said['job']}",
            "",
            f"Trained on {training.get('rows', 0):,} rows ({training.get('dropped', 0)} left out, "
            f"{training.get('truncated', 0)} cut) in {training.get('steps', 0):,} steps; settings of its own: "
            f"{settings}. {said['merge']['scale']:g} of the user's adapter was taken, and Reinforce merged at "
            f"{said['merge']['reinforce_scale']:g}.",
            "",
            looked,
            "",
            "In brackets the 95 % intervals. " + learnt,
            "",
            tabulate(hashes.items(), ["SHA-256 of", ""], tablefmt="github"),
            "",
        ]
    )
