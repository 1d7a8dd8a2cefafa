"""The comparison of two tables tells what became worse, and nothing that is noise."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import compare as comparison
from benchmarks.compare import compare, main
from benchmarks.rows import block_paths
from benchmarks.table import BLOCK, BLOCK_KEY, Table

USUAL = {
    "device": "Some CPU",
    "threads": 2,
    "torch": "2.13.0",
    "load_percent": 1,
    "drift_percent": 1,
    "case": "tiny 512",
    "shape": "1x512x10x14x10",
    "axes": "342",
    "dtype": "float32",
    "format": "contiguous",
    "mode": "full",
    "provider": "cpp",
    "status": "measured",
    "median_ms": 100,
    "low_ms": 98,
    "high_ms": 103,
    "peak_extra_mib": 40,
    "error": "1e-06",
}
GONE = {"median_ms": None, "low_ms": None, "high_ms": None, "peak_extra_mib": None, "error": None}


@pytest.fixture
def write(tmp_path):
    """Writes a table of one row for each set of cells; returns its path."""

    def table(name, *rows):
        path = tmp_path / name
        Table(path, tuple(BLOCK), BLOCK_KEY).put(USUAL | row for row in rows)
        return path

    return table


@pytest.fixture
def changes(write):
    """The changes between two tables of one row."""

    def between(before, after):
        return compare(*(Table(write(name, row), (), ()).read() for name, row in (("a.csv", before), ("b.csv", after))))

    return between


def spread(median, low, high):
    return {"median_ms": median, "low_ms": low, "high_ms": high}


@pytest.mark.parametrize(
    ("after", "worse", "factor", "beyond"),
    [(spread(120, 113.3, 125), True, 1.2, 10), (spread(50, 48, 49), False, 0.5, 100)],
)
def test_a_time_outside_the_spread_is_a_change(changes, after, worse, factor, beyond):
    (change,) = changes({}, after)
    assert (change.what, change.worse) == ("time", worse)
    assert change.factor == pytest.approx(factor)
    assert change.beyond_percent == pytest.approx(beyond, abs=0.1)


@pytest.mark.parametrize(
    "after",
    [spread(120, 102.9, 125), spread(80, 75, 98.1), spread(104.9, 104, 106), spread(95.3, 95, 96)],
    ids=["quartiles overlap", "they overlap below", "less than 5 %", "less than 5 % below"],
)
def test_a_time_within_the_spread_or_5_percent_is_none(changes, after):
    assert changes({}, after) == []


def test_memory_changes_by_more_than_5_percent_and_1_mib(changes):
    (larger,) = changes({}, {"peak_extra_mib": 42.1})
    assert (larger.what, larger.worse, larger.before, larger.after) == ("memory", True, "40.0 MiB", "42.1 MiB")
    (smaller,) = changes({}, {"peak_extra_mib": 20})
    assert (smaller.what, smaller.worse) == ("memory", False)
    assert changes({}, {"peak_extra_mib": 41.9}) == []
    assert changes({"peak_extra_mib": 2}, {"peak_extra_mib": 2.9}) == []


def test_an_error_changes_by_more_than_double(changes):
    (change,) = changes({}, {"error": "2.1e-06"})
    assert (change.what, change.worse) == ("error", True)
    assert changes({}, {"error": "1.9e-06"}) == []
    (change,) = changes({"error": "0.0e+00"}, {"error": "1e-06"})
    assert change.worse


def test_a_row_that_is_measured_no_longer_is_worse_than_any_slower_one(write):
    slow = {"provider": "torch"}
    before = Table(write("a.csv", slow, {}), (), ()).read()
    after = Table(write("b.csv", slow | spread(900, 890, 910), GONE | {"status": "wrong"}), (), ()).read()
    first, second = compare(before, after)
    assert (first.what, first.before, first.after, first.worse) == ("status", "measured", "wrong", True)
    assert second.what == "time"
    assert not compare(after, before)[-1].worse


def test_a_missing_row_counts_if_it_was_measured(write):
    failed = GONE | {"provider": "sdpa", "status": "failed"}
    before = Table(write("a.csv", {}, {"provider": "torch"}, failed), (), ()).read()
    after = Table(write("b.csv", {"provider": "torch"} | spread(50, 49, 51)), (), ()).read()
    missing, faster = compare(before, after)
    assert (missing.what, missing.row["provider"], missing.after, missing.worse) == ("row", "cpp", "missing", True)
    assert not faster.worse


def test_the_worst_change_stands_first(write):
    names = ["eager", "torch", "cpp"]
    before = Table(write("a.csv", *({"provider": name} for name in names)), (), ()).read()
    later = [spread(150, 149, 151), spread(50, 49, 51), spread(200, 199, 201)]
    after = Table(write("b.csv", *({"provider": n} | t for n, t in zip(names, later, strict=True))), (), ()).read()
    assert [change.row["provider"] for change in compare(before, after)] == ["cpp", "eager", "torch"]


def test_the_exit_status_says_whether_anything_is_worse(write, capsys):
    before, slow, fast = write("a.csv", {}), write("b.csv", spread(200, 199, 201)), write("c.csv", spread(50, 49, 51))
    assert main([before, slow]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        *("slower", "2.0×", "tiny", "512", "1x512x10x14x10", "float32", "contiguous", "full", "cpp"),
        *("100", "ms", "->", "200", "ms", "93", "%", "beyond", "the", "spread"),
    ]
    assert lines[-1] == "rows in both: 1; slower: 1, faster: 0, otherwise worse: 0, otherwise better: 0"
    assert main([before, fast]) == 0
    assert main([before, before]) == 0


def test_tables_of_two_devices_are_compared_and_it_is_said(write, capsys):
    here, there = {"device": "Other CPU", "threads": 8, "torch": "2.14.0"}, {}
    assert main([write("a.csv", there), write("b.csv", here | spread(50, 49, 51))]) == 0
    out = capsys.readouterr().out
    assert "note: device was Some CPU, is Other CPU." in out
    assert "note: threads was 2, is 8." in out
    assert "note: torch was 2.13.0, is 2.14.0." in out
    assert "note: rows are compared whatever their device and threads" in out
    assert "rows in both: 1; slower: 0, faster: 1," in out


def test_threads_that_both_tables_have_are_kept_apart(write):
    rows = Table(write("a.csv", {}, {"threads": 1} | spread(200, 199, 201)), (), ()).read()
    assert compare(rows, rows) == []
    assert [change.what for change in compare(rows, rows[:1])] == ["row"]


@pytest.mark.parametrize("noise", [{"load_percent": 11}, {"drift_percent": 16}])
def test_a_noisy_row_is_marked(write, capsys, noise):
    assert main([write("a.csv", noise), write("b.csv", spread(200, 199, 201))]) == 1
    out = capsys.readouterr().out
    assert "200 ms†" in out
    assert "note: changes from noisy rows: 1." in out


def git(folder, *words):
    settings = ["-c", "user.name=someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True)


def test_one_table_is_compared_with_its_last_commit(write, capsys, tmp_path):
    path = write("a.csv", {})
    git(tmp_path, "init")
    assert main([path]) == 2
    assert f"{path} has no committed version" in capsys.readouterr().out
    git(tmp_path, "add", path.name)
    git(tmp_path, "commit", "-m", "a table")
    assert main([path]) == 0
    write("a.csv", spread(200, 199, 201))
    git(tmp_path, "add", path.name)
    assert main([path]) == 1
    assert "slower: 1," in capsys.readouterr().out


def test_no_table_given_means_all_block_tables(write, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "block_paths", lambda: block_paths(tmp_path))
    assert main([]) == 2
    assert "no block table" in capsys.readouterr().out
    write("a.csv", {})
    write("b.csv", {})
    (tmp_path / "a-network.csv").write_text("network,time\nRSANet,1\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "tables")
    assert main([]) == 0
    assert capsys.readouterr().out.count("since its last commit:") == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "is not text"),
        (b"", "has no column device"),
        (b"device,case\nx,y\n", "has no column threads, shape"),
        ("short", "row 2:"),
        ("no number", "row 2: median_ms is 'fast', no number"),
        ("no time", "row 2: low_ms is nan, no time"),
        ("no shape", "the shape 'large' is not N x C x D x H x W"),
    ],
)
def test_a_bad_file_is_told_in_a_sentence(write, tmp_path, capsys, text, words):
    good, bad = write("good.csv", {}), tmp_path / "bad.csv"
    broken = {"no number": {"median_ms": "fast"}, "no time": {"low_ms": "nan"}, "no shape": {"shape": "large"}}
    if text == "short":
        bad.write_text(good.read_text().splitlines()[0] + "\nonly,three,cells\n")
    elif text in broken:
        write("bad.csv", broken[text])
    elif text is not None:
        bad.write_bytes(text)
    assert main([good, bad]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert str(bad) in line
    assert words in line


def test_three_tables_are_too_many(capsys):
    assert main([Path("a"), Path("b"), Path("c")]) == 2
    assert "3 tables were given" in capsys.readouterr().out
