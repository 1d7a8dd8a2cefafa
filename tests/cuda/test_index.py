"""The CUDA kernels' bodies, run thread by thread on the CPU, against torch in float64; and their index arithmetic."""

import ctypes

import emulation
import pytest
import torch
from emulation import DTYPES, padded, precise

pytestmark = pytest.mark.skipif(
    emulation.compiler() is None, reason="needs g++ on Linux, to run the kernels on the CPU"
)

# Of products of numbers that are exact in the dtype, with sums in float32 or float64.
TOLERANCES = {"bfloat16": 2e-6, "float16": 2e-6, "tf32": 2e-6, "float32": 2e-6, "float64": 1e-14}
# Half a unit in the last place of what a mix stores.
ROUNDINGS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "tf32": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}
SIDES = [(name, side) for name in DTYPES for side in (32, 64, 128) if (name, side) != ("float64", 128)]
# (N, D, H, W, C): ones, primes, sizes just above a tile and a chunk, more slices than a tile has.
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 7, 2, 5), (1, 33, 2, 3, 17), (2, 5, 3, 2, 66), (1, 2, 65, 1, 8), (3, 2, 2, 13, 16)]
LARGE = {32: (1, 2, 3, 70, 8), 64: (1, 2, 3, 131, 8), 128: (1, 1, 2, 197, 4)}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return emulation.compile_into(tmp_path_factory.mktemp("emulation"))


def random(shape, name, seed=0):
    """Numbers that the type of a product holds exactly."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if name == "tf32":
        return ((values * 64).round() / 64).float()
    return values.to(DTYPES[name])


def in_wider_rows(volume, extra):
    """The same numbers, as the first channels of a volume with more of them; all else around it is NaN."""
    *sizes, channels = volume.shape
    voxels = volume[..., 0].numel()
    surroundings = torch.full((voxels * 129, channels + extra), float("nan"), dtype=volume.dtype)
    result = surroundings[:voxels].view(*sizes, channels + extra)[..., :channels]
    return result.copy_(volume)


def slices_of(volume, axis):
    """``(N, S, P * C)`` in float64."""
    return volume.double().movedim(axis - 1, 1).flatten(2)


def assert_close(result, truth, size, tolerance):
    assert result.isfinite().all()
    assert ((result.double() - truth).abs() <= tolerance * size).all()


def check_contract(emulator, name, side, shape, axis, parts, extra=(0, 0)):
    left, right = (in_wider_rows(random(shape, name, seed), more) for seed, more in enumerate(extra))
    partial = emulator.contract(name, side, left, right, axis, parts)
    rows, columns = slices_of(left, axis), slices_of(right, axis)
    assert_close(partial.double().sum(1), rows @ columns.mT, rows.abs() @ columns.abs().mT, TOLERANCES[name])
    return partial


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize(("name", "side"), SIDES)
def test_contraction(name, side, axis, emulator):
    for shape in SHAPES:
        check_contract(emulator, name, side, shape, axis, parts=2)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_contraction_of_more_slices_than_a_tile_has(name, side, emulator):
    check_contract(emulator, name, side, LARGE[side], 4, parts=1)


@pytest.mark.parametrize("extra", [(8, 0), (1, 3), (16, 16), (2, 0)])
@pytest.mark.parametrize("name", DTYPES)
def test_contraction_of_parts_of_wider_products(name, extra, emulator):
    check_contract(emulator, name, 32, (2, 3, 7, 5, 16), 3, parts=3, extra=extra)


@pytest.mark.parametrize("name", DTYPES)
def test_each_part_of_a_contraction_has_its_own_chunks(name, emulator):
    shape, parts = (2, 3, 9, 11, 24), 4
    partial = check_contract(emulator, name, 32, shape, 2, parts)
    in_chunk = 256 // DTYPES[name].itemsize
    rows, columns = (slices_of(random(shape, name, seed), 2) for seed in (0, 1))
    for part in range(parts):
        own = torch.arange(rows.shape[2]) // in_chunk % parts == part
        truth = rows[..., own] @ columns[..., own].mT
        assert_close(partial[:, part], truth, rows.abs() @ columns.abs().mT, TOLERANCES[name])


def check_mix(emulator, name, side, shape, axis, parts, extra=(0, 0, 0), base=True, rank_one=True):
    volume = in_wider_rows(random(shape, name, 0), extra[0])
    rest = in_wider_rows(random(shape, name, 1), extra[1]) if base else None
    out = in_wider_rows(torch.full(shape, float("nan"), dtype=DTYPES[name]), extra[2])
    slices = shape[axis - 1]
    matrix = random((shape[0], slices, slices), name, 2)
    square = torch.zeros(shape[0], padded(slices), padded(slices), dtype=matrix.dtype)
    square[:, :slices, :slices] = matrix
    sum_dtype = precise(volume.dtype)
    beta = torch.tensor([0.75], dtype=sum_dtype) if base else None
    scales = vector = None
    if rank_one:
        scales = torch.randn(shape[0], padded(slices), dtype=sum_dtype)
        vector = torch.randn(shape[4], dtype=sum_dtype)
    emulator.mix(name, side, square, volume, axis, parts, rest, beta, scales, vector, out)

    factor = 0.75 if base else 1.0
    truth = factor * (matrix.double() @ slices_of(volume, axis))
    size = factor * (matrix.double().abs() @ slices_of(volume, axis).abs())
    if base:
        truth, size = truth + slices_of(rest, axis), size + slices_of(rest, axis).abs()
    if rank_one:
        places = truth.shape[2] // shape[4]
        term = scales[:, :slices, None].double() * vector.double().repeat(places)
        truth, size = truth + term, size + term.abs()
    result = slices_of(out, axis)
    assert_close(result, truth, size * TOLERANCES[name] + truth.abs() * ROUNDINGS[name], 1.01)
    if extra[2]:
        whole = out.as_strided((*shape[:4], shape[4] + extra[2]), out.stride())
        assert whole[..., shape[4] :].isnan().all()


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize(("name", "side"), SIDES)
def test_mix(name, side, axis, emulator):
    for index, shape in enumerate(SHAPES):
        check_mix(emulator, name, side, shape, axis, parts=1 + index % 2, base=index % 3 != 0, rank_one=index % 2 == 0)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_mix_of_more_slices_than_a_tile_has(name, side, emulator):
    """Two blocks of rows; and in float32 and float64 more blocks of the map than stay in shared memory."""
    check_mix(emulator, name, side, LARGE[side], 4, parts=1)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_mix_of_more_slices_than_stay_in_shared_memory(name, emulator):
    check_mix(emulator, name, 128, (1, 2, 10, 200, 8), 4, parts=2)


@pytest.mark.parametrize("extra", [(8, 0, 0), (1, 3, 0), (0, 16, 8), (0, 0, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", DTYPES)
def test_mix_of_parts_of_wider_products(name, extra, emulator):
    check_mix(emulator, name, 32, (2, 3, 7, 5, 16), 3, parts=3, extra=extra)


def test_mix_onto_its_base(emulator):
    volume, base = random((2, 3, 4, 5, 16), "bfloat16", 0), random((2, 3, 4, 5, 16), "bfloat16", 1)
    matrix = random((2, 16, 16), "bfloat16", 2).tril(-1).triu(-3)
    matrix[:, 4:], matrix[..., 4:] = 0, 0
    apart = emulator.mix("bfloat16", 32, matrix, volume, 3, 2, base)
    assert torch.equal(emulator.mix("bfloat16", 32, matrix, volume, 3, 2, base, out=base), apart)


def nearest_tf32(numbers):
    return ((numbers.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("side", [32, 64, 128])
def test_tf32_operands_are_rounded_to_nearest(side, emulator):
    left, right = torch.randn(2, 1, 3, 5, 7, 16), torch.randn(1, 16, 16)
    partial = emulator.contract("tf32", side, *left, 3, 1)
    rows, columns = (slices_of(nearest_tf32(volume), 3) for volume in left)
    assert_close(partial[:, 0], rows @ columns.mT, rows.abs() @ columns.abs().mT, TOLERANCES["tf32"])
    right[:, 5:], right[..., 5:] = 0, 0
    mixed = emulator.mix("tf32", side, right, left[0], 3, 1)
    matrix = nearest_tf32(right)[:, :5, :5].double()
    assert_close(slices_of(mixed, 3), matrix @ rows, matrix.abs() @ rows.abs(), TOLERANCES["tf32"])


@pytest.mark.parametrize("slices", [1, 2, 5, 16, 17, 64, 131, 261])
@pytest.mark.parametrize("name", DTYPES)
def test_softmax(name, slices, emulator):
    batch, parts, factor = 1 + (slices < 64), 7, 0.3
    partial = torch.randn(batch, parts, slices, slices, dtype=precise(DTYPES[name])) * 4
    truth = torch.softmax(factor * partial.double().sum(1), -1)
    attention, rounded = emulator.softmax(name, partial.clone(), factor)
    assert_close(attention, truth, truth, 1e-14 * 30 if name == "float64" else 1e-5)
    assert torch.equal(rounded[:, :slices, :slices], attention.to(DTYPES[name]))
    assert not rounded[:, slices:].any()
    assert not rounded[:, :, slices:].any()
    for transposed in (False, True):
        padded_map = emulator.pad(name, attention, transposed)
        assert torch.equal(padded_map, rounded.mT if transposed else rounded)


def test_softmax_of_large_logits(emulator):
    partial = torch.tensor([[[[3e4, -3e4], [-3e38, -3e38]]]])
    attention, _ = emulator.softmax("float32", partial, 1.0)
    assert torch.equal(attention, torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]))


@pytest.mark.parametrize("slices", [1, 2, 5, 16, 17, 64, 131, 261])
@pytest.mark.parametrize("name", DTYPES)
def test_softmax_backward(name, slices, emulator):
    batch, parts, factor = 1 + (slices < 64), 5, 1.5
    dtype = precise(DTYPES[name])
    partial = torch.randn(batch, parts, slices, slices, dtype=dtype)
    attention = torch.softmax(torch.randn(batch, slices, slices, dtype=dtype), -1)
    beta = torch.tensor([0.7], dtype=dtype)
    contracted = partial.double().sum(1)
    dots = (attention.double() * contracted).sum(-1)
    for scale, scaled in ((None, 1.5), (beta, 1.5 * beta.double().item())):
        truth = scaled * attention.double() * (contracted - dots[..., None])
        plain, transposed, row_dots = emulator.softmax_backward(name, partial.clone(), attention, scale, factor)
        assert torch.equal(transposed, plain.mT)
        tolerance = 1e-13 if dtype == torch.float64 else 1e-5
        assert_close(row_dots[:, :slices], dots, 1 + dots.abs(), tolerance)
        assert not row_dots[:, slices:].any()
        size = truth.abs() + tolerance / ROUNDINGS[name] + truth.abs().sum(-1, keepdim=True)
        assert_close(plain[:, :slices, :slices], truth, size, ROUNDINGS[name] * 1.01)
        assert not plain[:, slices:].any()
        assert not plain[:, :, slices:].any()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_rounding_keeps_the_sums_of_rows_of_the_logits_gradient(name, emulator):
    partial, attention = torch.randn(1, 3, 40, 40), torch.softmax(torch.randn(1, 40, 40), -1)
    contracted = partial.sum(1)
    grad = attention * (contracted - (attention * contracted).sum(-1, keepdim=True))
    plain, *_ = emulator.softmax_backward(name, partial, attention, None, 1.0)
    naive = grad.to(DTYPES[name]).double().sum(-1).abs().mean()
    assert plain.double().sum(-1).abs().mean() < naive / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 130), (64, 64), (65, 63), (129, 1)])
def test_transpose(dtype, rows, columns, emulator):
    source = torch.randn(3, rows, columns).to(dtype)
    assert torch.equal(emulator.transpose(source), source.mT)


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_of_a_volume_has_one_place_among_the_columns(shape, axis, emulator):
    batch, *sizes, channels = shape
    volume = torch.arange(batch * sizes[0] * sizes[1] * sizes[2] * channels).reshape(shape)
    truth = volume.movedim(axis - 1, 1).flatten(2)
    in_order = (ctypes.c_int64 * 5)(batch, channels, *sizes)
    found = torch.empty_like(truth)
    for n in range(batch):
        for slice_index in range(truth.shape[1]):
            for k in range(truth.shape[2]):
                numbers = map(ctypes.c_int64, (channels, n, slice_index, k))
                found[n, slice_index, k] = emulator.library.element_of(in_order, axis, *numbers)
    assert torch.equal(found, truth)
    place = (ctypes.c_int64 * 3)()
    emulator.library.column_of(in_order, axis, ctypes.c_int64(truth.shape[2]), place)
    assert not place[2]


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_offsets_past_32_bits(axis, emulator):
    """A volume of 2^36 elements, of which none is touched."""
    batch, depth, height, width, channels = 5, 1021, 1031, 2048, 7
    sizes = (ctypes.c_int64 * 5)(batch, channels, depth, height, width)
    d, h, w, c = 1020, 1029, 2045, 6
    slice_index, position = {2: (d, h * width + w), 3: (h, d * width + w), 4: (w, d * height + h)}[axis]
    numbers = map(ctypes.c_int64, (channels, 4, slice_index, position * channels + c))
    truth = (((4 * depth + d) * height + h) * width + w) * channels + c
    assert truth > 2**35
    assert emulator.library.element_of(sizes, axis, *numbers) == truth


@pytest.mark.parametrize("chunks", [1, 2, 5, 63, 64, 1000])
def test_every_chunk_belongs_to_one_part(chunks, emulator):
    library = emulator.library
    for tiles, batch, programs in [(1, 1, 264), (4, 2, 264), (9, 1, 8), (1, 300, 264)]:
        parts = library.parts_for(*map(ctypes.c_int64, (chunks, tiles, batch, programs, 4)))
        assert 1 <= parts <= max(1, chunks // 4)
        assert parts == 1 or parts * tiles * batch <= programs
        mine = [
            part + step * parts
            for part in range(parts)
            for step in range(library.chunks_for(*map(ctypes.c_int64, (chunks, part, parts))))
        ]
        assert sorted(mine) == list(range(chunks))
        found, result = set(), (ctypes.c_int64 * 3)()
        for block in range(tiles * parts * batch):
            library.program_for(*map(ctypes.c_int64, (block, tiles, parts)), result)
            found.add(tuple(result))
        assert found == {(t, p, n) for t in range(tiles) for p in range(parts) for n in range(batch)}


def test_copies_are_as_wide_as_every_voxel_is_aligned(emulator):
    for number in (2, 4, 8):
        for start in (0, 2, 4, 8, 16):
            for channels in range(1, 20):
                for row in (channels, channels + 1, channels + 8):
                    arguments = (ctypes.c_uint64(start), ctypes.c_int64(channels), ctypes.c_int64(row))
                    width = emulator.library.width_for(*arguments, number)
                    if start % number == 0:
                        assert start % width == 0 == channels * number % width == row * number % width
                    aligned = start % 16 == channels * number % 16 == row * number % 16 == 0
                    assert (width == 16) == aligned


def _conflicts(addresses):
    """Whether two of the 16-byte words that eight lanes read together lie in the same banks."""
    return len({address % 128 // 16 for address in addresses}) < len(addresses)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_no_two_rows_that_are_read_together_share_a_bank(name, side, emulator):
    number = emulation.NUMBERS[name]
    strides = (ctypes.c_int * 2)()
    emulator.library.strides_of_mix(number, side, strides)
    contracted = emulator.library.stride_of_contract(number, side)
    assert not any(stride % 16 for stride in (contracted, *strides))
    # ldmatrix, and the vectors of the scalar products: eight rows at one byte.
    assert not _conflicts([row * contracted for row in range(8)])
    assert not _conflicts([row * strides[0] for row in range(8)])
    if DTYPES[name].itemsize == 2:
        assert not _conflicts([row * strides[1] for row in range(8)])
    if name == "tf32":  # four rows of eight neighbours
        words = {(row * strides[1] + 4 * column) % 128 for row in range(4) for column in range(8)}
        assert len(words) == 32


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_the_emulated_rounding_is_that_of_torch(name, emulator):
    values = torch.cat([torch.randn(500) * 10.0**power for power in range(-8, 6)])
    rounded = torch.tensor([emulator.library.round_trip(emulation.NUMBERS[name], ctypes.c_float(v)) for v in values])
    assert torch.equal(rounded, values.to(DTYPES[name]).float())
