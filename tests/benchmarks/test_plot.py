"""Pictures and Markdown show what a table holds, and nothing else."""

import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import plot
from benchmarks.cases import SHAPES, SWEEPS
from benchmarks.plot import STYLES, draw, spread
from benchmarks.report import fill, markdown, markdown_all
from benchmarks.rows import block_paths, read, volume_label
from benchmarks.table import BLOCK, BLOCK_KEY, Table

WHERE = {
    "device": "Some CPU",
    "threads": 2,
    "torch": "2.13.0",
    "commit": "abc1234",
    "date": "2026-11-25",
    "load_percent": 1,
    "drift_percent": 1,
    "axes": "342",
    "dtype": "float32",
    "format": "contiguous",
}
MS = {"eager": 100, "torch.compile": 80, "torch": 50, "cpp": 20}


def row(case, provider, shape=None, status="measured", **cells):
    sizes = {"case": case, "shape": "x".join(map(str, shape or SHAPES[case])), "provider": provider, "status": status}
    common = WHERE | {"mode": "full"} | sizes
    if status != "measured":
        return common | cells
    ms = cells.get("median_ms", MS.get(provider, 60))
    numbers = {"median_ms": ms, "low_ms": 0.95 * ms, "high_ms": 1.05 * ms, "error": "1e-06", "peak_extra_mib": ms}
    return common | numbers | {"floor_ms": 10, "percent_of_floor": round(1000 / ms)} | cells


def both_passes(case, **cells):
    return [row(case, name, mode=mode, **cells) for name in MS for mode in ("full", "no_grad")]


def grown(kind, provider, out_of_memory_from=math.inf):
    for shape in SWEEPS[kind][:4]:
        size = math.prod(shape) / 1e4
        status = "out of memory" if math.prod(shape[2:]) >= out_of_memory_from else "measured"
        numbers = {"median_ms": size * MS[provider], "peak_extra_mib": size} if status == "measured" else {}
        yield row(f"sweep {kind}", provider, shape, status, **numbers)


@pytest.fixture
def table(tmp_path):
    """Makes a table of rows."""

    def made(*rows, name="some-cpu.csv"):
        found = Table(tmp_path / name, tuple(BLOCK), BLOCK_KEY)
        found.put(rows)
        return found

    return made


def texts(path):
    """All words of a picture."""
    return ["".join(element.itertext()) for element in ElementTree.parse(path).iter() if element.tag.endswith("}text")]


def cells(text, start):
    """The cells of the Markdown line that starts so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("| ").split("|")]


# Pictures ----------------------------------------------------------------------------------------------------------


def test_the_speed_picture_tells_ratios_to_eager_and_times(table, tmp_path):
    (path,) = draw(table(*both_passes("tiny 512")), tmp_path / "pictures")
    assert path == tmp_path / "pictures" / "speed-some-cpu.svg"
    words = texts(path)
    assert "512 channels, 10 × 14 × 10 (eager: 100 ms)" in words
    assert [word for word in words if "×  " in word] == 2 * ["1.25×  80.0 ms", "2.0×  50.0 ms", "5.0×  20.0 ms"]
    assert [word for word in words if word.endswith("float32")] == [
        "forward + backward, float32",
        "forward, no gradients, float32",
    ]


def test_a_panel_of_another_dtype_is_drawn_where_it_has_rows(table, tmp_path):
    half = [row("tiny 512", name, dtype="bfloat16") for name in ("eager", "eager autocast", "cpp")]
    (path,) = draw(table(*both_passes("tiny 512"), *half), tmp_path)
    words = texts(path)
    assert "forward + backward, bfloat16" in words
    assert "forward, no gradients, bfloat16" not in words
    assert words.count("eager autocast") == 1


def test_only_whole_contiguous_blocks_of_named_cases_are_drawn(table, tmp_path, capsys):
    others = [
        row("tiny 512", "cpp", axes="3"),
        row("tiny 512", "cpp", format="channels_last_3d"),
        row("call", "cpp"),
        row("tiny 512", "cpp", dtype="float64"),
    ]
    assert draw(table(*others), tmp_path) == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[0] for line in lines] == [
        f"not drawn: {kind}-some-cpu.svg" for kind in ("speed", "memory", "sweeps")
    ]


def drawn_lines(path, kind):
    """The axes of a picture before it is a file, by their titles."""
    rows = read(path)
    figure = {"speed": plot._speed, "memory": plot._memory, "sweeps": plot._sweeps}[kind](rows)
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_bars_start_at_eager_and_the_floor_and_quartiles_are_where_they_are(table):
    axes = drawn_lines(table(*both_passes("tiny 512")).path, "speed")["forward + backward, float32"]
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bars in axes.containers for bar in bars]
    assert ends == [(1, pytest.approx(1.25)), (1, pytest.approx(2)), (1, pytest.approx(5))]
    lines = [tuple(line.get_xdata()) for line in axes.lines]
    assert (10, 10) in lines
    assert any(line == pytest.approx((100 / 21, 100 / 19)) for line in lines)
    assert axes.get_xlim()[1] > 10


def test_a_provider_without_memory_is_told_beside_the_bars(table, tmp_path):
    rows = [row("brain 16", "cpp"), row("brain 16", "eager", status="out of memory")]
    (path,) = draw(table(*rows, row("brain 16", "torch", status="out of memory")), tmp_path)
    words = texts(path)
    assert "16 channels, 182 × 218 × 182 (eager: out of memory)" in words
    assert "out of memory" in words
    assert "20.0 ms" in words


def test_the_memory_picture_marks_where_memory_ended(table, tmp_path):
    rows = [*grown("V", "cpp"), *grown("V", "eager", 48**3)]
    paths = draw(table(*rows), tmp_path)
    assert [path.name for path in paths] == ["memory-some-cpu.svg", "sweeps-some-cpu.svg"]
    words = texts(paths[0])
    assert words.count("eager: out of memory at 48³") == 2
    assert f"cpp: {math.prod(SWEEPS['V'][3]) / 1e4:.0f} MiB" in words
    assert not any(word.startswith("cpp: out of memory") for word in words)


def test_curves_pass_through_what_was_measured(table):
    rows = [*grown("V", "cpp"), *grown("V", "eager", 48**3)]
    axes = drawn_lines(table(*rows).path, "memory")
    black, blue = STYLES["eager"].colour, STYLES["cpp"].colour
    lines = {line.get_color(): line for line in axes["peak memory (MiB)"].lines if len(line.get_xdata()) > 1}
    expected = [math.prod(shape) / 1e4 for shape in SWEEPS["V"][:4]]
    assert list(lines[blue].get_xdata()) == [math.prod(shape[2:]) for shape in SWEEPS["V"][:4]]
    assert list(lines[blue].get_ydata()) == pytest.approx(expected)
    assert list(lines[black].get_ydata()) == pytest.approx(expected[:2])
    top = axes["peak memory (MiB)"].get_ylim()[1]
    assert top > 1.3 * max(expected)
    times = {line.get_color(): line for line in axes["time (ms)"].lines if len(line.get_xdata()) > 1}
    assert list(times[blue].get_ydata()) == pytest.approx([20 * size for size in expected])
    assert list(times["#999999"].get_ydata()) == [10] * 4


def test_a_curve_that_was_stopped_by_something_else_is_not_called_out_of_memory(table, tmp_path):
    first, second, third, _ = grown("V", "eager", 48**3)
    skipped = {key: value for key, value in second.items() if not key.endswith("_ms")} | {"status": "skipped"}
    paths = draw(table(*grown("V", "cpp"), first, skipped, third), tmp_path)
    assert not any("out of memory" in word for word in texts(paths[0]))


@pytest.mark.parametrize(
    ("kind", "title", "places"),
    [
        ("S", "slices: 64 channels, S × 48 × 48", [1, 4, 16, 48]),
        ("C", "channels: 24 × 24 × 24", [8, 16, 32, 64]),
        ("V", "voxels: 32 channels", [16**3, 32**3, 48**3, 64**3]),
        ("N", "batch: 128 channels, 16 × 16 × 16", [1, 2, 4, 8]),
    ],
)
def test_each_sweep_grows_along_its_own_size(table, kind, title, places):
    axes = drawn_lines(table(*(found for sweep in SWEEPS for found in grown(sweep, "cpp"))).path, "sweeps")
    assert len(axes) == 4
    assert list(axes[title].lines[-1].get_xdata()) == places


def test_one_volume_makes_a_picture(table, tmp_path):
    first, *_ = grown("V", "cpp")
    assert len(draw(table(first), tmp_path)) == 2
    assert [line for line in texts(tmp_path / "memory-some-cpu.svg") if line == "16³"] == ["16³", "16³"]


def test_equal_tables_give_equal_pictures_without_a_date_on_white(table, tmp_path):
    rows = [*both_passes("tiny 512"), *(found for sweep in SWEEPS for found in grown(sweep, "cpp"))]
    first, second = (draw(table(*rows), tmp_path / name) for name in ("first", "second"))
    assert len(first) == 3
    for one, other in zip(first, second, strict=True):
        content = one.read_text()
        assert content == other.read_text()
        assert "dc:date" not in content
        (ground,) = [part for part in ElementTree.fromstring(content).iter() if part.get("id") == "patch_1"]
        assert "fill: #ffffff" in ground[0].get("style")
        assert not list(one.parent.glob("*.new"))


def test_lines_differ_without_colour():
    providers = ["eager", "eager autocast", "torch.compile", "sdpa", "non-local", "reference", "torch", "cuda"]
    for own in ("cpp", "triton"):
        looks = [(STYLES[name].line, STYLES[name].marker) for name in [*providers, own, f"{own} recompute"]]
        assert len(set(looks)) == len(looks)
    bars = [STYLES[name].hatch for name in ("eager autocast", "torch.compile", "sdpa", "torch", "cuda", "cpp")]
    assert len(set(bars)) == len(bars)


def test_a_noisy_row_is_marked_in_a_picture(table, tmp_path):
    (path,) = draw(table(row("tiny 512", "eager"), row("tiny 512", "cpp", load_percent=50)), tmp_path)
    words = texts(path)
    assert "5.0×  20.0 ms†" in words
    assert any(word.startswith("† noisy:") for word in words)


def test_labels_are_moved_apart_and_keep_their_order():
    assert spread([0.5, 0.1, 0.52], 0.1) == pytest.approx([0.46, 0.1, 0.56])
    assert spread([0.3, 0.3, 0.3, 0.42], 0.1) == pytest.approx([0.18, 0.28, 0.38, 0.48])
    assert spread([], 0.1) == []


def test_importing_the_module_does_not_need_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import benchmarks.plot"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Markdown ----------------------------------------------------------------------------------------------------------


def test_the_readme_table_tells_times_ratio_floor_and_memory(table):
    found = cells(markdown(table(*both_passes("tiny 512"))), "512 channels, 10 × 14 × 10 | forward + backward")
    assert found[2:] == ["100 ms", "80.0 ms", "50.0 ms", "**20.0 ms**", "5.0×", "50 %", "100, 80, 20"]


def test_what_is_missing_is_not_yet_measured(table):
    found = cells(markdown(table(row("tiny 512", "cpp"))), "512 channels, 10 × 14 × 10 | forward + backward")
    missing = "not yet measured"
    assert found[2:] == [*3 * [missing], "**20.0 ms**", missing, "50 %", f"{missing}, {missing}, 20"]
    assert markdown(table(row("tiny 512", "cpp", status="failed"))) == "Not yet measured."


@pytest.mark.parametrize(
    "other", [{"dtype": "bfloat16"}, {"format": "channels_last_3d"}, {"axes": "3"}, {"mode": "backward"}]
)
def test_the_readme_table_is_about_whole_float32_contiguous_blocks(table, other):
    rows = both_passes("tiny 512")
    assert markdown(table(*rows, row("tiny 512", "cpp", median_ms=7, **other))) == markdown(table(*rows, name="b.csv"))


def test_a_status_stands_where_there_is_no_time(table):
    rows = [row("tiny 512", "cpp"), row("tiny 512", "eager", status="out of memory")]
    found = cells(markdown(table(*rows)), "512 channels, 10 × 14 × 10 | forward + backward")
    assert (found[2], found[6], found[8]) == ("out of memory", "–", "out of memory, not yet measured, 20")


def test_on_a_gpu_triton_stands_for_this_package(table):
    setting = {"driver": "570", "dtype": "bfloat16", "format": "channels_last_3d"}
    rows = [row("tiny 512", name, **setting) for name in ("eager", "torch", "triton", "cuda")]
    found = markdown(table(*rows))
    assert "| `torch` | `triton` | `triton` to eager |" in found
    assert "threads" not in found
    contiguous = [row("tiny 512", "triton", **(setting | {"format": "contiguous"}))]
    assert markdown(table(*contiguous, name="b.csv")) == "Not yet measured."


def test_on_a_gpu_times_in_a_cuda_graph_have_a_line_of_their_own(table):
    setting = {"driver": "570", "dtype": "bfloat16", "format": "channels_last_3d"}
    times = {"eager": (100, 30), "torch": (50, None), "triton": (60, 6)}
    rows = [row("tiny 512", name, median_ms=ms, graph_ms=graph, **setting) for name, (ms, graph) in times.items()]
    text = markdown(table(*rows))
    plain = cells(text, "512 channels, 10 × 14 × 10 | forward + backward |")
    graph = cells(text, "512 channels, 10 × 14 × 10 | forward + backward, CUDA graph")
    assert plain[2:8] == ["100 ms", "not yet measured", "**50.0 ms**", "60.0 ms", "1.67×", "–"]
    assert graph[2:8] == ["30.0 ms", "–", "–", "6.00 ms", "5.0×", "17 %"]


@pytest.mark.parametrize("write", [markdown, markdown_all])
def test_a_dagger_is_explained_where_it_stands(table, write):
    assert "†" not in write(table(*both_passes("tiny 512")))
    noisy = write(table(row("tiny 512", "eager", drift_percent=20)))
    assert "100 ms†" in noisy
    assert "† noisy: others took more than 10 %" in noisy


def test_rows_of_other_threads_do_not_stand_beside(table):
    rows = [*both_passes("tiny 512"), row("wide 256", "cpp", threads=1, median_ms=7)]
    assert "7.00 ms" not in markdown(table(*rows))
    everything = markdown_all(table(*rows))
    assert "7.00 ms" in everything
    assert everything.index("2 threads") < everything.index("1 thread,")


def test_the_full_table_holds_every_named_measurement_once(table):
    rows = [
        *both_passes("tiny 512"),
        *both_passes("odd 65", dtype="bfloat16", error="4e-3"),
        row("tiny 512", "cpp", axes="3", median_ms=7),
        *grown("V", "cpp"),
    ]
    rows[-5]["error"] = "5e-07"
    text = markdown_all(table(*rows))
    lines = [line for line in text.splitlines() if line.startswith("| ") and "channels" in line]
    assert len(lines) == 5
    assert cells(text, "65 channels, 17 × 19 × 23, batch 3 | bfloat16 | contiguous | forward, no")[4:] == [
        *("100 ms", "80.0 ms", "50.0 ms", "20.0 ms", "5.0×", "4.0×", "50 %", "1.00×")
    ]
    assert cells(text, "512 channels, 10 × 14 × 10, coronal only")[7] == "7.00 ms"
    assert text == markdown_all(table(*rows))


def test_the_error_is_told_as_a_multiple_of_eagers(table):
    rows = [row("tiny 512", "eager", error="2e-06"), row("tiny 512", "cpp", error="5e-07")]
    assert cells(markdown_all(table(*rows)), "512 channels")[-1] == "0.25×"


def test_a_volume_is_named_in_words():
    assert volume_label((1, 512, 10, 14, 10)) == "512 channels, 10 × 14 × 10"
    assert volume_label((3, 1, 17, 19, 23)) == "1 channel, 17 × 19 × 23, batch 3"


# Files -------------------------------------------------------------------------------------------------------------


def test_fill_replaces_what_stands_between_its_markers_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- benchmark:x -->\nold\n<!-- /benchmark:x -->\nb\n<!-- benchmark:y -->\n")
    for _ in range(2):
        fill(readme, "x", "new ×\n")
    text = "a\n<!-- benchmark:x -->\nnew ×\n<!-- /benchmark:x -->\nb\n<!-- benchmark:y -->\n"
    assert readme.read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- benchmark:x -->",
        "<!-- /benchmark:x -->",
        "<!-- benchmark:x --> <!-- benchmark:x --> <!-- /benchmark:x -->",
        "<!-- /benchmark:x --> <!-- benchmark:x -->",
        2 * "<!-- benchmark:x --> <!-- /benchmark:x -->",
    ],
)
def test_fill_refuses_a_readme_without_one_place(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="no single place for the table x: put <!-- benchmark:x -->"):
        fill(readme, "x", "new")
    assert readme.read_text() == text


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The command's files, in a folder of the test."""
    monkeypatch.setattr(plot, "PICTURES", tmp_path / "docs" / "benchmarks")
    monkeypatch.setattr(plot, "README", tmp_path / "README.md")
    monkeypatch.setattr(plot, "block_paths", lambda: block_paths(tmp_path))
    return tmp_path


def test_the_command_draws_every_block_table_and_prints_the_paths(places, table, capsys):
    table(*both_passes("tiny 512"))
    table(*grown("V", "cpp"), name="other.csv")
    common = "Some CPU,2,windows,1x3x64x80x64,64x64x64,measured"
    (places / "some-cpu-network.csv").write_text(
        "device,threads,case,shape,window,status,provider,median_ms,dice,attention_percent,peak_extra_mib\n"
        f"{common},published eager fp32,3000,1.0000,0.9,480\n{common},ours bf16,1000,0.9990,0.31,120\n"
    )
    readme = places / "README.md"
    marked = "".join(
        f"<!-- benchmark:{name} -->\n<!-- /benchmark:{name} -->\n" for name in ("some-cpu", "some-cpu-network")
    )
    readme.write_text(marked)
    assert plot.main() == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("not drawn")]
    names = ["memory-other.svg", "sweeps-other.svg", "other.md", "speed-some-cpu.svg", "some-cpu.md"]
    names += ["README.md", "README.md"]
    assert [line.rsplit("/", 1)[1] for line in printed] == names
    assert (places / "some-cpu.md").read_text().startswith("# The block on Some CPU\n")
    assert "512 channels, 10 × 14 × 10" in readme.read_text(encoding="utf-8")
    line = "| windows, 3 × 64 × 80 × 64, in 64 × 64 × 64 | 3000 ms | not yet measured | not yet measured | "
    line += "not yet measured | **1000 ms** | 3.0× | 0.9990 | 0.3 % | 480, 120 |"
    assert line in readme.read_text(encoding="utf-8")
    assert line in (places / "some-cpu.md").read_text(encoding="utf-8")
    (places / "some-cpu-network.csv").write_text("network,time\nRSANet,1\n")
    assert plot.main() == 2
    assert "is no network table, it has no column device" in capsys.readouterr().out


def test_a_table_that_is_none_does_not_keep_others_from_being_drawn(places, table, capsys):
    (places / "a.csv").write_text("device,case\n")
    table(*both_passes("tiny 512"))
    assert plot.main() == 2
    out = capsys.readouterr().out
    assert out.startswith(f"{places / 'a.csv'} is no block table, it has no column threads")
    assert "speed-some-cpu.svg" in out
    assert plot.main([places / "missing.csv"]) == 2
    assert capsys.readouterr().out.startswith(f"{places / 'missing.csv'} cannot be read (No such file")


def test_without_a_table_the_command_says_how_to_make_one(places, capsys):
    assert plot.main() == 2
    assert "measure with `python -m benchmarks` first" in capsys.readouterr().out


def test_without_matplotlib_the_command_says_what_to_install(places, table, capsys, monkeypatch):
    table(*both_passes("tiny 512"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main() == 2
    assert capsys.readouterr().out == 'pictures need matplotlib, which is not installed: pip install ".[segment]"\n'
