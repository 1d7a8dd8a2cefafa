"""Synthetic heads, the ways in which NIfTI can store one and the same head, and a network that knows its lesions."""

from dataclasses import dataclass
from functools import lru_cache

import nibabel as nib
import numpy as np
import torch
from segment.bright import CPU, FP32
from torch import nn

from rsanet.segment.segmenter import Segmenter

SHAPE = (17, 20, 15)
STEP = 4  # what every voxel is a multiple of, so that bytes with a slope of 4 hold it
NONE = ((0, 0), (0, 0), (0, 0))


class BrightAndDark(nn.Module):
    """A network whose lesions are bright on the first channel and dark on the second, each voxel on its own."""

    def __init__(self):
        super().__init__()
        self.thresholds = nn.Parameter(torch.tensor([1.0, -1.0]))

    def forward(self, x):
        bright, dark = self.thresholds
        logit = 40 * torch.minimum(x[:, :1] - bright, dark - x[:, 1:2])
        return torch.cat([-logit, logit], dim=1)


def segmenter(**options):
    return Segmenter(BrightAndDark(), ("FLAIR", "T1w"), (16, 16, 16), None, CPU, FP32, **options)


@dataclass(frozen=True)
class Head:
    """Voxels ``(X, Y, Z)``, whole multiples of `STEP`.

    Attributes:
        images: FLAIR and T1w, in this order.
        lesions: bright on FLAIR and dark on T1w. What is only one of both is none, and stands elsewhere, so that
            contrasts that do not lie on each other find something else.
        other: a second mask that has to do with the first.
    """

    images: dict[str, np.ndarray]
    lesions: np.ndarray
    other: np.ndarray


@lru_cache(maxsize=8)
def make_head(seed, air=False):
    """A head without any symmetry; its background is exactly 0, or with ``air`` noise of up to 8."""
    rng = np.random.default_rng(seed)
    axes = np.indices(SHAPE)
    centre, radius = (np.array(SHAPE) - 1) / 2, np.array(SHAPE) / 2 - 0.5

    def ball(where, size):
        return sum((axes[axis] - where[axis]) ** 2 for axis in range(3)) < size

    def spots(count):
        places = [centre + rng.uniform(-0.6, 0.6, 3) * radius for _ in range(count)]
        return np.logical_or.reduce([ball(place, rng.uniform(2, 7)) for place in places])

    head = sum(((axes[axis] - centre[axis]) / radius[axis]) ** 2 for axis in range(3)) < 1
    lesions, bright, dark = spots(4) & head, spots(2) & head, spots(2) & head
    bright, dark = bright & ~lesions, dark & ~lesions & ~bright
    images = {}
    for name, tissue, lesion, only in (("FLAIR", 112, 240, bright), ("T1w", 176, 40, dark)):
        image = tissue + STEP * rng.integers(-3, 4, SHAPE)
        image[lesions | only] = lesion
        background = STEP * rng.integers(0, 3, SHAPE) if air else 0
        images[name] = np.where(head, image, background)
    other = (np.roll(lesions, 1, rng.integers(3)) & head) ^ (bright & (rng.random(SHAPE) < 0.8))
    return Head(images, lesions, other)


@dataclass(frozen=True)
class Storage:
    """How a file stores a volume.

    Attributes:
        order: which axis of the head each axis of the file is.
        flips: which axes of the file run backwards.
        margin: voxels of background that are added at both ends of each axis of the head.
        dtype: of NumPy, with its byte order.
        slope: what a stored 1 means.
        offset: what is stored for 0.
        version: of NIfTI, 1 or 2.
        suffix: of the file.
        forms: which of sform and qform say where the voxels are; see `set_forms`.
        dimensions: 3, or more with a length of 1.
    """

    order: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)
    margin: tuple[tuple[int, int], ...] = NONE
    dtype: str = "<f4"
    slope: float = 1.0
    offset: int = 0
    version: int = 1
    suffix: str = ".nii.gz"
    forms: str = "both"
    dimensions: int = 3

    def save(self, path, voxels, affine):
        """Writes voxels ``(X, Y, Z)`` of a head, whole multiples of the slope; returns the file."""
        voxels = np.pad(np.asarray(voxels, np.float64), self.margin)
        affine = affine @ translation([-before for before, _ in self.margin])
        turned, affine = self.turn(voxels, affine)
        stored = np.round(turned / self.slope) + self.offset
        kind = np.dtype(self.dtype)
        if kind.kind in "iu":
            least, most = np.iinfo(kind).min, np.iinfo(kind).max
            assert least <= stored.min() <= stored.max() <= most, "the test's own storage does not hold the values"
        stored = stored.astype(kind).reshape(stored.shape + (1,) * (self.dimensions - 3))
        make = nib.Nifti1Image if self.version == 1 else nib.Nifti2Image
        header = make.header_class(endianness=">" if kind.byteorder == ">" else "<")
        header.set_data_dtype(kind)
        header.set_xyzt_units("mm", "sec")
        image = make(stored, affine, header)
        set_forms(image, affine, self.forms)
        image.header.set_slope_inter(self.slope, -self.slope * self.offset)
        file = path.with_name(path.name + self.suffix)
        nib.save(image, file)
        return file

    def turn(self, voxels, affine):
        """Voxels and affine with the axes of the file, by themselves, not by nibabel's functions."""
        turned = voxels.transpose(self.order)
        affine = affine[:, [*self.order, 3]].copy()
        for axis, flip in enumerate(self.flips):
            if flip:
                turned = np.flip(turned, axis)
                affine[:3, 3] += affine[:3, axis] * (turned.shape[axis] - 1)
                affine[:3, axis] *= -1
        return turned, affine


def set_forms(image, affine, forms):
    """Writes where the voxels are into sform or qform; the one that does not count holds something else."""
    elsewhere = np.array([[0, -1, 0, 30], [1, 0, 0, -20], [0, 0, 1, 10], [0, 0, 0, 1.0]]) @ affine
    sform, qform, codes = {
        "both": (affine, affine, (1, 1)),
        "sform": (affine, None, (2, 0)),
        "sform, qform without code": (affine, elsewhere, (1, 0)),
        "sform of MNI, qform of the scanner": (affine, elsewhere, (4, 1)),
        "qform": (None, affine, (0, 1)),
        "qform, sform without code": (elsewhere, affine, (0, 1)),
    }[forms]
    image.set_sform(sform, codes[0])
    image.set_qform(qform, codes[1])
    if sform is not None:  # nibabel leaves out what has code 0
        image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = sform[:3]
    if qform is not None:
        image.header.set_qform(qform, codes[1])
    image.header["sform_code"], image.header["qform_code"] = codes


FORMS = ("sform", "sform, qform without code", "sform of MNI, qform of the scanner")
FORMS_OF_RIGID = (*FORMS, "both", "qform", "qform, sform without code")  # a qform has no shear


def translation(shift):
    matrix = np.eye(4)
    matrix[:3, 3] = shift
    return matrix


def make_affine(turns, zooms, shear, origin):
    """From voxels to mm: turned about x, y and z by degrees, ``shear`` of y by z, of x by z and of x by y."""
    matrix = np.eye(3)
    for axis, degrees in enumerate(turns):
        angle, (one, two) = np.deg2rad(degrees), [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[one, one] = turn[two, two] = np.cos(angle)
        turn[one, two], turn[two, one] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    upper = np.eye(3)
    upper[1, 2], upper[0, 2], upper[0, 1] = shear
    affine = translation(origin)
    affine[:3, :3] = matrix @ upper @ np.diag(zooms)
    return affine


def places(mask, affine):
    """World coordinates ``(voxels, 3)`` in mm of a mask's voxels."""
    return nib.affines.apply_affine(affine, np.argwhere(mask))
