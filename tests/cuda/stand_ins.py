"""The operators of csrc/cuda/binding.cpp on the CPU: in plain PyTorch, or by the kernels themselves in their emulator.

Both refuse what the binding refuses.
"""

import torch
from emulation import padded, precise

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32", torch.float64: "float64"}


def check(tensor, dtype, *sizes):
    assert tensor.dtype == dtype
    assert tuple(tensor.shape) == sizes
    assert tensor.is_contiguous()


def check_volume(volume, like):
    assert volume.dtype == like.dtype
    assert volume.shape == like.shape
    channels = volume.shape[4]
    assert channels == 1 or volume.stride(4) == 1
    row, voxels = None, 1
    for dim in (3, 2, 1, 0):
        if volume.shape[dim] != 1:
            row = row or volume.stride(dim)
            assert volume.stride(dim) == row * voxels
            voxels *= volume.shape[dim]
    assert row is None or row >= channels


def check_map(matrix, dtype, batch, slices):
    check(matrix, dtype, batch, padded(slices), padded(slices))


class Checked:
    """What the binding checks; the work is left to methods with an underscore."""

    def __init__(self):
        self.calls = []

    def contract(self, left, right, axis, tf32):
        self.calls.append("contract")
        check_volume(left, left)
        check_volume(right, left)
        assert axis in (2, 3, 4)
        return self._contract(left, right, axis)

    def mix(self, matrix, volume, axis, tf32, base, beta, row_scale, vector, out):
        self.calls.append("mix")
        batch, slices, dtype = volume.shape[0], volume.shape[axis - 1], precise(volume.dtype)
        check_map(matrix, volume.dtype, batch, slices)
        for other in (volume, out, *([] if base is None else [base])):
            check_volume(other, volume)
        assert out.data_ptr() != volume.data_ptr()
        if beta is not None:
            check(beta, dtype)
        assert (row_scale is None) == (vector is None)
        if row_scale is not None:
            check(row_scale, dtype, batch, padded(slices))
            check(vector, dtype, volume.shape[4])
        self._mix(matrix, volume, axis, base, beta, row_scale, vector, out)

    def softmax(self, partial, factor, attention, padded_map):
        self.calls.append("softmax")
        batch, _, slices, _ = partial.shape
        assert partial.is_contiguous()
        assert partial.dtype == precise(padded_map.dtype)
        check(attention, partial.dtype, batch, slices, slices)
        check_map(padded_map, padded_map.dtype, batch, slices)
        self._softmax(partial, factor, attention, padded_map)

    def pad(self, attention, transposed, padded_map):
        self.calls.append("pad")
        batch, slices, _ = attention.shape
        check(attention, precise(padded_map.dtype), batch, slices, slices)
        check_map(padded_map, padded_map.dtype, batch, slices)
        self._pad(attention, transposed, padded_map)

    def softmax_backward(self, partial, attention, beta, factor, grad_logits, transposed, row_dots):
        self.calls.append("softmax_backward")
        batch, _, slices, _ = partial.shape
        assert partial.is_contiguous()
        assert partial.dtype == precise(grad_logits.dtype)
        check(attention, partial.dtype, batch, slices, slices)
        if beta is not None:
            check(beta, partial.dtype)
        check_map(grad_logits, grad_logits.dtype, batch, slices)
        check_map(transposed, grad_logits.dtype, batch, slices)
        check(row_dots, partial.dtype, batch, padded(slices))
        self._softmax_backward(partial, attention, beta, factor, grad_logits, transposed, row_dots)

    def transpose(self, source, target):
        self.calls.append("transpose")
        batch, rows, columns = source.shape
        check(source, source.dtype, batch, rows, columns)
        check(target, source.dtype, batch, columns, rows)
        self._transpose(source, target)


def fill(padded_map, matrix):
    slices = matrix.shape[-1]
    padded_map.zero_()
    padded_map[:, :slices, :slices] = matrix


class Plain(Checked):
    """In plain PyTorch, with sums in the accumulation dtype."""

    @staticmethod
    def _slices(volume, axis):
        return volume.to(precise(volume.dtype)).movedim(axis - 1, 1).flatten(2)

    def _contract(self, left, right, axis):
        logits = self._slices(left, axis) @ self._slices(right, axis).mT
        return torch.stack([0.25 * logits, 0.75 * logits], 1)

    def _mix(self, matrix, volume, axis, base, beta, row_scale, vector, out):
        slices = volume.shape[axis - 1]
        mixed = matrix[:, :slices, :slices].to(precise(volume.dtype)) @ self._slices(volume, axis)
        mixed = mixed.view(volume.movedim(axis - 1, 1).shape).movedim(1, axis - 1)
        if beta is not None:
            mixed = beta * mixed
        if base is not None:
            mixed = base + mixed
        if row_scale is not None:
            sizes = [volume.shape[0], 1, 1, 1, 1]
            sizes[axis - 1] = slices
            mixed = mixed + row_scale[:, :slices].reshape(sizes) * vector
        out.copy_(mixed)

    def _softmax(self, partial, factor, attention, padded_map):
        attention.copy_(torch.softmax(factor * partial.sum(1), -1))
        partial.fill_(float("nan"))
        fill(padded_map, attention)

    def _pad(self, attention, transposed, padded_map):
        fill(padded_map, attention.mT if transposed else attention)

    def _softmax_backward(self, partial, attention, beta, factor, grad_logits, transposed, row_dots):
        contracted = partial.sum(1)
        dots = (attention * contracted).sum(-1)
        grad = factor * (1 if beta is None else beta) * attention * (contracted - dots[..., None])
        partial.fill_(float("nan"))
        fill(grad_logits, grad)
        transposed.copy_(grad_logits.mT)
        row_dots.zero_()
        row_dots[:, : dots.shape[1]] = dots

    def _transpose(self, source, target):
        target.copy_(source.mT)


class Emulated(Checked):
    """By the kernels, thread by thread."""

    def __init__(self, emulator, side=32, parts=2):
        super().__init__()
        self._emulator, self._side, self._parts = emulator, side, parts

    def _contract(self, left, right, axis):
        return self._emulator.contract(NAMES[left.dtype], self._side, left, right, axis, self._parts)

    def _mix(self, matrix, volume, axis, base, beta, row_scale, vector, out):
        name = NAMES[volume.dtype]
        self._emulator.mix(name, self._side, matrix, volume, axis, self._parts, base, beta, row_scale, vector, out)

    def _softmax(self, partial, factor, attention, padded_map):
        results = self._emulator.softmax(NAMES[padded_map.dtype], partial, factor)
        attention.copy_(results[0])
        padded_map.copy_(results[1])

    def _pad(self, attention, transposed, padded_map):
        padded_map.copy_(self._emulator.pad(NAMES[padded_map.dtype], attention, transposed))

    def _softmax_backward(self, partial, attention, beta, factor, *targets):
        results = self._emulator.softmax_backward(NAMES[targets[0].dtype], partial, attention, beta, factor)
        for target, result in zip(targets, results, strict=True):
            target.copy_(result)

    def _transpose(self, source, target):
        target.copy_(self._emulator.transpose(source))
