"""Ratios, tables and lines from records."""

import pytest
from benchmarks import report
from benchmarks.pairing import Contender, Record
from benchmarks.report import Case, run_case, summarize


@pytest.fixture
def records():
    """Speed-ups by round 2, 4, 3: their median is 3, though the ratio of the medians (4 and 12 s) is not."""
    ours = Record(1.0, 9.0, 2, 0, 2.0, [1.0, 4.0, 10.0], [2.0, 8.0, 20.0], [10.0, 10.0, 10.0], [0.1, 0.2])
    other = Record(3.0, 8.0, 0, 1, 8.0, [2.0, 16.0, 12.0], [4.0, 9.0, 8.0], [10.0, 10.0, 4.0], [0.1, 0.4])
    return {"ours": ours, "other": other}


def test_ratios_are_taken_in_each_round(records):
    figures = summarize(records)

    assert figures["ours"]["speedup"] == {"median": 1, "least": 1, "most": 1}
    assert figures["other"]["speedup"] == pytest.approx({"median": 3, "least": 2, "most": 4})
    assert figures["other"]["seconds"] == 12 and figures["other"]["busy"] == 8
    assert figures["ours"]["per_second"] == 2.5
    assert figures["other"]["work"] == 5 and figures["other"]["peak_ratio"] == 0.25


def test_a_case_prints_its_table_and_returns_its_figures(records, monkeypatch, capsys):
    monkeypatch.setattr(report, "race", lambda contenders, rounds, name: records)
    names = [Contender(name, None, "", {}) for name in records]
    case = Case("c", "how it is done", names, "token", lambda got: [f"saw {got['other'][1]}"], 10**12, "TPU v4")
    result = run_case(case, 3)

    assert result["contenders"]["ours"]["tflops"] == 2.5
    printed = capsys.readouterr().out
    for text in ("c: how it is done", "token/s", "3.000x (2.000 to 4.000)", "0+1", "saw 0.4", "0.25x"):
        assert text in " ".join(printed.split())
    assert "ours 2.500 (MFU 0.9%)" in printed  # of 275 TFLOP/s
