"""What a finished experiment prints on the screen: the scores, the gates and where the report is."""

import os
import pathlib
from collections.abc import Mapping

from br_jax.evaluation.scores import LABELS, ordered, outcome, read_score

_COLUMNS = {"harmful": "HS", "harmful_plus": "HS+", "task": "FA", "over_refusal": "over-refusal"}
_OUTCOMES = {
    "held": "the claim held",
    "failed": "the claim did NOT hold",
    "attack_failed": "the attack failed: this experiment shows nothing",
    "incomplete": "no verdict: the run is not complete",
    "no_attack": "no attack in this run: it shows what the defense costs",
}


def print_summary(results: Mapping, workdir: str | os.PathLike) -> int:
    """Prints scores (percent, 95 % interval), gates and the verdict.

    Args:
        results: results.json.
        workdir: where the report lies.

    Returns:
        1 when the attack failed, so that nothing is shown, else 0: the exit status of a script.
    """
    print(f"\n{'model':<22}" + "".join(f"{title:>24}" for title in _COLUMNS.values()))
    for name in ordered(results["models"], LABELS):
        scores = results["models"][name]
        print(f"{LABELS[name]:<22}" + "".join(f"{read_score(scores[key])!s:>24}" for key in _COLUMNS))
    print("\ngate")
    for gate in results["gates"]:
        value = "not run" if gate["value"] is None else f"{100 * gate['value']:+.1f}"
        mark = {True: "passed", False: "FAILED", None: "-"}[gate["passed"]]
        print(f"  {mark:<8}{gate['text']}: {value} points (limit {gate['sense']} {100 * gate['limit']:.0f})")
    said = outcome(results["gates"])
    print(f"\n{_OUTCOMES[said]}; report: {pathlib.Path(workdir) / 'report.md'}")
    return int(said == "attack_failed")
