"""The bench's arithmetic, and the form of what it writes. Nothing here looks at a clock."""

import json

import pytest

from server.load.arithmetic import Zipf, percentile
from tests.bench.options import parse
from tests.bench.report import page, table
from tests.bench.results import Results
from tests.bench.stats import milliseconds, ratio
from tests.bench.workload import CASES, PREFILL, Case


def test_percentile() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert [percentile(values, share) for share in (0, 0.5, 0.9, 1)] == [1, 2.5, pytest.approx(3.7), 4]
    assert percentile([7.0], 0.99) == 7


def test_milliseconds_are_left_out_where_nothing_streams() -> None:
    assert milliseconds("gap", [0.010, 0.020, 0.030]) == {"gap_median_ms": 20.0, "gap_p99_ms": 29.8}
    assert milliseconds("gap", []) == {}


def test_ratio_by_medians_and_by_bests() -> None:
    assert ratio([10, 30, 20], [5, 4, 10]) == {"median": 4.0, "best": 3.0}
    assert ratio([10, 30, 20], [5, 4, 10], lower=True) == {"median": 4.0, "best": 2.5}


def test_zipf() -> None:
    zipf, counts = Zipf(100, seed=1), [0] * 100
    for _ in range(50_000):
        counts[zipf.draw()] += 1
    harmonic = sum(1 / rank for rank in range(1, 101))
    for number in (0, 1, 9, 99):
        assert counts[number] / 50_000 == pytest.approx(1 / (number + 1) / harmonic, abs=0.006)
    first, second = Zipf(100, seed=2), Zipf(100, seed=2)
    assert [first.draw() for _ in range(50)] == [second.draw() for _ in range(50)]


def test_requests_of_a_case() -> None:
    requests = Case(8, 16).requests(run=3)
    assert [request.adapter for request in requests] == [f"a{index % 8}" for index in range(16)]
    assert len({request.prompt.split(" The ")[0] for request in requests}) == 16
    assert {request.adapter for request in Case(1, 8, first=3).requests(0)} == {"a3"}
    assert {request.adapter for request in Case(0, 8).requests(0)} == {None}
    assert len({case.title for case in CASES}) == len(CASES)
    assert len(PREFILL[0].requests(0)[0].prompt) > 5 * len(CASES[0].requests(0)[0].prompt)


def test_options() -> None:
    found = parse(
        ["--only", "zipf,loaded", "--peer", "vllm=/one", "--serve=--max-running 8"],
        {"BENCH_VLLM": "/other", "BENCH_OPENVINO": "/three"},
    )
    assert found.only == ("zipf", "loaded")
    assert found.paths == {"vllm": "/one", "openvino": "/three"}
    assert found.serve == ("--max-running", "8")
    assert parse(["--full"], {}).repeat > parse([], {}).repeat


@pytest.mark.parametrize("arguments", [["--only", "zipff"], ["--peer", "vllm"], ["--peer", "peft=x"]])
def test_wrong_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments, {})
    assert arguments[1] in capsys.readouterr().err


def test_rows_in_table_json_and_page() -> None:
    results = Results()
    results.row("throughput", "base, 8 at once", "polyrank int8", "tokens/s", [100, 120], first_token_median_ms=31.5)
    results.row("throughput", "base, 8 at once", "peer <1>", "tokens/s", [50.0, 40.0])
    results.row("adapters", "rank 8", "upload", "ms", [30, 20, 40])
    results.ratio("ours to theirs", [100, 120], [50.0, 40.0])
    results.skip("vllm", "not given")
    assert [(row["median"], row["best"]) for row in results.rows] == [(110, 120), (45, 50), (30, 20)]
    text = table(results.rows, results.ratios)
    assert "110.00     120.00 tokens/s" in text
    assert "ours to theirs" in text
    facts = {"commit": "abc", "flags": ["avx2"], "versions": {"torch": "2"}}
    whole = {"facts": facts, "peers": {"p": {"version": "1"}}, "skipped": results.skipped}
    whole |= {"rows": results.rows, "ratios": results.ratios}
    assert json.loads(json.dumps(whole)) == whole
    html = page(whole)
    assert html.count("<rect") == 3
    assert html.count("<svg") == 2
    assert "peer &lt;1&gt;" in html
    assert "peer <1>" not in html
    assert all(word in html for word in ("first token median ms", "31.5", "vllm skipped", "torch 2"))
