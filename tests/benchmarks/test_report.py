"""Ratios, tables and lines from records."""

import pytest
from benchmarks import report
from benchmarks.pairing import Contender, Record
from benchmarks.report import Case, run_case


def test_ratios_are_taken_in_each_round_and_printed(monkeypatch, capsys):
    """Speed-ups by round 2, 4, 3: their median is 3, though the ratio of the medians (4 and 12 s) is not."""
    ours = Record(1.0, 9.0, 2, 0, 2.0, [1.0, 4.0, 10.0], [2.0, 8.0, 20.0], [10.0, 10.0, 10.0], [0.1, 0.2])
    other = Record(3.0, 8.0, 0, 1, 8.0, [2.0, 16.0, 12.0], [4.0, 9.0, 8.0], [10.0, 10.0, 4.0], [0.1, 0.4])
    monkeypatch.setattr(report, "race", lambda contenders, rounds, name: {"ours": ours, "other": other})
    names = [Contender(name, None, "", {}) for name in ("ours", "other")]
    case = Case("c", "how it is done", names, "token", lambda got: [f"saw {got['other'][1]}"], 10**12, "TPU v4")
    figures = run_case(case, 3)["contenders"]

    assert figures["ours"]["speedup"] == {"median": 1, "least": 1, "most": 1}
    assert figures["other"]["speedup"] == pytest.approx({"median": 3, "least": 2, "most": 4})
    assert figures["other"]["seconds"] == 12 and figures["other"]["busy"] == 8
    assert figures["ours"]["per_second"] == figures["ours"]["tflops"] == 2.5
    assert figures["other"]["work"] == 5 and figures["other"]["peak_ratio"] == 0.25
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("c: how it is done", "token/s", "3.000x (2.000 to 4.000)", "0+1", "saw 0.4", "0.25x"):
        assert text in printed
    assert "ours 2.500 (MFU 0.9%)" in printed  # of 275 TFLOP/s
