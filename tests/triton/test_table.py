"""The launch table: what it says, what may replace it, and what a volume's size changes."""

import json
import random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from recording import recording, run_attention, run_block

from rsa_kernels import __main__ as report
from rsa_kernels import backends
from rsa_kernels.triton import tune, tuning
from rsa_kernels.triton.tuning import Tiling

if backends.interpreted():
    pytest.skip("notes launches instead of interpreting them", allow_module_level=True)

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "hip"]


@pytest.fixture(autouse=True)
def fresh_table():
    tuning.tiling.cache_clear()
    tuning.overrides.cache_clear()
    yield
    tuning.tiling.cache_clear()
    tuning.overrides.cache_clear()


def launches(arch, *arguments, run=run_block):
    with recording(arch) as made:
        run(*arguments)
    return made


def names(made):
    return [launch.kernel for launch, *_ in made]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_block_finds_kernels(dtype, arch):
    for slices in (1, 16, 17, 64, 65, 128, 129, 257, 512):
        for channels in (1, 3, 16, 20, 32, 64, 100, 128, 129):
            for launch, _, programs, _ in launches(arch, (1, channels, slices, 1, 2), (2,), dtype):
                constant = launch.constant
                assert programs >= 1
                if "K" in constant and "C" in constant:
                    width = constant.get("BC", constant["C"])
                    assert constant["PB"] >= 1
                    assert constant["PB"] * width <= constant["K"]
                if "BI" in constant:
                    assert constant["SP"] % constant["BI"] == 0
                    assert constant["SP"] >= slices


def test_the_regimes_are_chosen_where_they_serve():
    def kernels(shape, dtype=torch.bfloat16, arch="sm_90"):
        return set(names(launches(arch, shape, (2,), dtype)))

    narrow = {"narrow.map", "narrow.mix", "narrow.map_backward", "narrow.mix_backward"}
    for channels in (8, 16, 32, 64):
        for slices in (5, 32, 64, 128):
            assert narrow <= kernels((1, channels, slices, 2, 3))
    assert {"narrow.map", "wide.mix_backward"} <= kernels((1, 32, 192, 2, 3))  # forward narrow, backward wide
    assert kernels((1, 256, 32, 2, 3)).isdisjoint(narrow)
    assert kernels((1, 32, 64, 2, 3), torch.float32).isdisjoint(narrow)
    assert kernels((1, 32, 64, 2, 3), arch="hip").isdisjoint(narrow)


def test_a_step_forward_is_three_launches_and_in_the_wide_regime_a_product_besides():
    from rsa_kernels.triton import block

    def forward(shape):
        x = torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last_3d)
        weights = block.Projections(*(torch.zeros(size) for size in [(shape[1],) * 2, (shape[1],)] * 3))
        with recording("sm_90") as made:
            block.recurrent_slice_attention(x, weights, torch.zeros(3), (3, 4, 2), 1.0, False)
        return names(made)

    assert forward((1, 32, 20, 20, 20)) == [
        *("weights.fold", "narrow.map", "maps.softmax", "narrow.mix"),
        *("narrow.map", "maps.softmax", "narrow.mix") * 2,
    ]
    assert forward((1, 512, 10, 14, 10)) == [
        *("weights.fold", "wide.contract", "maps.softmax", "wide.mix"),
        *("wide.contract", "maps.softmax", "wide.mix") * 2,
    ]


@pytest.mark.parametrize("channels", [32, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_volumes_of_other_sizes_compile_nothing(dtype, channels):
    made = launches("sm_90", (1, channels, 40, 6, 8), (3, 4, 2), dtype)
    again = launches("sm_90", (2, channels, 61, 5, 7), (3, 4, 2), dtype)
    assert {launch for launch, *_ in again} <= {launch for launch, *_ in made}
    made = launches("sm_90", (1, channels, 40, 6, 8), 2, dtype, run=run_attention)
    again = launches("sm_90", (2, channels, 61, 5, 7), 2, dtype, run=run_attention)
    assert {launch for launch, *_ in again} == {launch for launch, *_ in made}


def test_partial_maps_are_bounded():
    """All programs together hold a few maps for each multiprocessor, whatever the volume."""
    for shape in [(1, 32, 128, 16, 16), (4, 16, 16, 64, 64), (64, 8, 5, 4, 4)]:
        for launch, _, _, arguments in launches("sm_90", shape, (2,), torch.bfloat16):
            if launch.kernel.endswith((".map", ".map_backward", ".contract")):
                partial = next(argument for argument in arguments if getattr(argument, "dim", int)() == 4)
                assert partial.shape[0] * partial.shape[1] <= max(6 * 132, shape[0])


def test_a_file_replaces_entries(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    entry = {"columns": 32, "rows": 64, "warps": 4, "stages": 2}
    path.write_text(json.dumps({"sm_90": {"map/half/64/64": None, "map/half/64/32": entry}}))
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(path))
    assert tuning.tiling("map", "sm_90", "half", 50, 32) == Tiling(32, 64, 4, 2)
    assert tuning.tiling("map", "sm_90", "half", 50, 64) is None
    assert tuning.tiling("map", "sm_80", "half", 50, 64) is not None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"sm_90": {"map/half/64/64": {"columns": 32, "rows": 64, "warps": 4, "stages": 2}}}',
        '{"sm_90": {"map/half/64/32": {"columns": 48, "rows": 64, "warps": 4, "stages": 2}}}',
        '{"sm_90": {"map/half/64/32": {"columns": 64}}}',
        '{"sm_90": {"nap/half/64/32": {"columns": 64, "rows": 64, "warps": 4, "stages": 2}}}',
        '{"sm_90": {"map/half/48/32": {"columns": 64, "rows": 64, "warps": 4, "stages": 2}}}',
        '{"sm_90": {"map/half/64/32": {"columns": 64, "rows": 64, "warps": 4, "stages": 2, "programs": 0}}}',
        '{"sm_90": {"map/half/64/32": {"columns": 64, "rows": 64, "warps": 4, "stages": 2.0}}}',
        '{"sm90": {"map/half/64/64": null}}',
        '{"sm_90": {"contract/half/64/64": null}}',
        '{"sm_90": {"map_backward/half/64/32": {"columns": 64, "rows": 32, "warps": 4, "stages": 2}}}',
    ],
)
def test_a_file_that_is_no_table_is_refused(content, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text(content)
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(path))
    with pytest.raises(
        ValueError, match=r"the launch table .*table.json, which RSA_KERNELS_TRITON_TABLE names, cannot"
    ):
        tuning.tiling("map", "sm_90", "half", 50, 32)


def test_tf32_is_used_where_torch_allows_it():
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        assert tuning.kind(torch.float32) == "float"
        torch.backends.cuda.matmul.allow_tf32 = True
        assert tuning.kind(torch.float32) == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def test_tuning_finds_what_is_faster_and_leaves_the_rest(tmp_path, monkeypatch):
    def measure():
        entry = tuning.tiling("map", "sm_90", "half", 128, 32)
        return 1.0 + (entry.warps != 4) + (entry.stages != 2) + 0.001 * entry.programs

    best = tune.improve("map", "sm_90", "half", 128, 32, measure)
    assert (best.warps, best.stages, best.programs) == (4, 2, 1)
    assert tune.improve("map", "sm_90", "half", 128, 32, lambda: 1.0) is None
    assert tune.improve("map", "sm_90", "float", 128, 32, lambda: 1.0) is None  # no such kernel
    noise = random.Random(0)
    for kernel in ("map", "contract", "mix_slices"):
        assert tune.improve(kernel, "sm_90", "half", 128, 32, lambda: 1 + 0.04 * noise.random()) is None
    path = tmp_path / "table.json"
    tune.write({"sm_90": {"map/half/128/32": best._asdict()}}, path)
    tune.write({"sm_80": {}, "sm_90": {"mix/half/16/32": best._replace(rows=16)._asdict()}}, path)
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(path))
    tuning.overrides.cache_clear()
    tuning.tiling.cache_clear()
    assert tuning.tiling("map", "sm_90", "half", 128, 32) == best
    assert set(tuning.overrides()["sm_90"]) == {"map/half/128/32", "mix/half/16/32"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 32, 64, 2, 2), torch.bfloat16), ((1, 256, 64, 2, 2), torch.bfloat16), ((1, 512, 10, 2, 2), torch.float32)],
)
def test_tuning_tunes_what_a_block_launches(shape, dtype):
    made = set(names(launches("sm_90", shape, (2,), dtype)))
    table_names = {"wide.mix": "mix_slices", "wide.mix_backward": "mix_slices", "wide.contract": "contract"}
    launched = {table_names.get(name, name.removeprefix("narrow.")) for name in made}
    tuned = {kernel for kernel, _ in tune.kernels_of("sm_90", tuning.kind(dtype), shape[2], shape[1])}
    assert tuned == launched & set(tuning.NARROW_KERNELS + tuning.WIDE_KERNELS)


def test_the_tune_command_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rsa_kernels", "tune", "--shape", "1", "32", "8", "8", "8"])
    if torch.cuda.is_available():
        pytest.skip("says so only where there is no GPU")
    assert report.main() == 1
    assert (
        capsys.readouterr().err == "the triton backend needs a GPU, and torch finds none: use the torch backend here\n"
    )
