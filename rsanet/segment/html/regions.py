"""Where in the brain a lesion lies, as far as its images tell: a heuristic, and the sentence where it cannot tell.

The images have to be skull-stripped. Cerebrospinal fluid is dark on FLAIR and on T1w; the lateral ventricles are its
large component deep in the upper brain, and the grey matter beneath the outer fluid, which T1w alone shows, is the
cortex. Positions are measured in the box around the brain, as proportions of an adult's: the head has to be about
upright in the scan, and wholly in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from rsanet.segment.volumes import tissue_mask

Array = np.ndarray

REGIONS = ("periventricular", "juxtacortical", "deep white matter", "infratentorial")

# Of the brain's box. An adult's is about 140 mm wide and 175 mm long; its height depends on where the stem is cut, so
# heights are measured from the top in these units, too.
WIDTH_MM, LENGTH_MM = 140.0, 175.0
SIZES_MM = ((100, 180), (125, 215), (95, 190))  # of a brain's box along x, y and z; another is not a whole brain
LARGEST_BRAIN_ML = 2000.0  # with its fluid; a head is larger
CONSTANT = 0.9  # of what is no tissue, in a background that a program made; splines change the rest
TOUCHING = 0.1  # of a face of the scan's box covered by brain: the brain is cut off there

DARK = {"FLAIR": 0.55, "T1w": 0.62}  # of the median tissue: what is darker is fluid
COARSE_MM = 2.0  # grid on which the ventricles are looked for
DEEP_MM = 18.0  # ventricles lie deeper below the brain's surface
VENTRICLES_ML = (3.0, 200.0)  # a component of another size is not the ventricles

PERIVENTRICULAR_MM = 2.0  # of tissue between a lesion and the ventricles, at most
JUXTACORTICAL = 0.22  # of what surrounds a lesion is cortex, at least
SHELL_MM = (1.5, 5.0)  # from the lesion: what surrounds it; nearer voxels are partly lesion
CORTEX_MM = 6.0  # from the outer fluid or the brain's surface to the depth of the cortex
SMOOTH_MM = 1.0  # standard deviation of the filter that keeps noise from looking like grey matter

NO_T1W = (
    "Without a T1w image the cortex cannot be told from the white matter: lesions that are neither periventricular nor "
    "infratentorial have no region."
)


@dataclass(frozen=True, eq=False)
class Regions:
    """What could be told.

    Attributes:
        names: a region for each lesion, or ``""`` where it cannot be told.
        reason: the sentence why, where it cannot; else ``""``.
        ventricles: (X, Y, Z) bool, or None.
    """

    names: list[str]
    reason: str
    ventricles: Array | None = None


def is_stripped(image: Array, tissue: Array, spacing: Array) -> bool:
    """Whether an image shows nothing but a brain: of the size of one, in a background that is constant.

    Args:
        image: (X, Y, Z).
        tissue: (X, Y, Z) bool, as `tissue_mask` finds it.
        spacing: voxel size in mm.
    """
    around = image[~tissue]
    if not around.size or np.count_nonzero(tissue) * np.prod(spacing) > LARGEST_BRAIN_ML * 1000:
        return False
    return bool(np.count_nonzero(around == np.median(around)) > CONSTANT * around.size)


def tell_regions(images: Mapping[str, Array], affine: Array, lesions: Sequence[Array]) -> Regions:
    """The region of each lesion.

    Args:
        images: (X, Y, Z) by contrast, axes right, anterior, superior; FLAIR, T1w or both.
        affine: voxel to world mm.
        lesions: voxels (N, 3) of each.
    """
    nowhere = [""] * len(lesions)
    if not lesions:
        return Regions([], "")
    known = {name: image for name, image in images.items() if name in DARK}
    if not known:
        return Regions(nowhere, "Regions are told from a FLAIR or a T1w image, and there is neither.")
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
    image = next(iter(known.values()))
    tissue = tissue_mask(image)
    if not is_stripped(image, tissue, spacing):
        return Regions(
            nowhere,
            "Regions are told on skull-stripped images alone, whose background is constant: around the brain of this "
            "one there is more.",
        )
    brain = _brain(tissue)
    box = ndimage.find_objects(brain.astype(np.uint8))[0]
    lengths = np.array(brain[box].shape) * spacing
    if reason := _whole(brain, lengths):
        return Regions(nowhere, reason)
    # A lesion may reach beyond the brain that is found, and need not.
    corner = np.array([span.start for span in box])
    inside = [voxels[((voxels >= corner) & (voxels < corner + brain[box].shape)).all(1)] - corner for voxels in lesions]
    cropped = {name: volume[box].astype(np.float32) for name, volume in known.items()}
    names, reason, found = _tell(cropped, brain[box], spacing, inside)
    ventricles = np.zeros(brain.shape, bool) if found is not None else None
    if ventricles is not None:
        ventricles[box] = found
    return Regions(names, reason, ventricles)


def _tell(
    known: Mapping[str, Array], brain: Array, spacing: Array, lesions: Sequence[Array]
) -> tuple[list[str], str, Array | None]:
    """The fields of `Regions`, of images in the box of the brain."""
    # 0 in the middle, at the front and at the top, in mm of a brain of usual size.
    lengths = np.array(brain.shape) * spacing
    scale = np.array([WIDTH_MM / lengths[0], LENGTH_MM / lengths[1], LENGTH_MM / lengths[1]]) * spacing
    zero = np.array([brain.shape[0] / 2, brain.shape[1], brain.shape[2]]) - 0.5
    bright = np.zeros(brain.shape, bool)
    for voxels in lesions:
        bright[tuple(voxels.T)] = True
    fluid = brain & ~bright
    for name, volume in known.items():
        fluid &= volume < DARK[name] * np.median(volume[brain])
    ventricles = _ventricles(fluid, brain, spacing, zero, scale)
    if ventricles is None:
        return [""] * len(lesions), "The lateral ventricles were not found on these images, so no region is told.", None
    tree = KDTree(np.argwhere(_surface(ventricles)) * spacing)
    # Between the middles of neighbouring voxels there is nothing, but a distance.
    close = PERIVENTRICULAR_MM + float(spacing.prod()) ** (1 / 3)
    tissue = _Tissue.of(known["T1w"], brain, bright, spacing) if "T1w" in known else None
    # Dark lesions that nobody drew are no fluid on FLAIR, but FLAIR shows the fluid in narrow sulci less well.
    outer = (tissue.fluid() if tissue else fluid) & ~_grown(ventricles, spacing)
    names = []
    for voxels in lesions:
        if not len(voxels):
            names.append("")
        elif tree.query(voxels * spacing)[0].min() <= close:
            names.append(REGIONS[0])
        elif _is_infratentorial((voxels.mean(0) - zero) * scale):
            names.append(REGIONS[3])
        elif tissue is None:
            names.append("")
        else:
            names.append(REGIONS[1 if tissue.cortex_around(voxels, outer) >= JUXTACORTICAL else 2])
    return names, "" if tissue else NO_T1W, ventricles


@dataclass(frozen=True, eq=False)
class _Tissue:
    """What T1w tells of the tissue around lesions.

    Attributes:
        image: (X, Y, Z) T1w.
        brain: (X, Y, Z) bool.
        lesions: (X, Y, Z) bool.
        spacing: voxel size in mm.
        dark: the value between fluid and grey matter.
        white: the value between grey and white matter.
    """

    image: Array
    brain: Array
    lesions: Array
    spacing: Array
    dark: float
    white: float

    @classmethod
    def of(cls, image: Array, brain: Array, lesions: Array, spacing: Array) -> "_Tissue":
        """Fluid, grey and white matter are the three means that the values gather around."""
        values = image[brain & ~lesions]
        values = values[:: max(1, values.size // 200_000)]
        means = np.percentile(values, (5, 40, 85))
        for _ in range(15):
            nearest = np.digitize(values, (means[1:] + means[:-1]) / 2)
            means = np.array([values[nearest == n].mean() if (nearest == n).any() else means[n] for n in range(3)])
        return cls(image, brain, lesions, spacing, float(means[:2].mean()), float(means[1:].mean()))

    def fluid(self) -> Array:
        """(X, Y, Z), where there is fluid."""
        return self.brain & ~self.lesions & (self.image < self.dark)

    def cortex_around(self, voxels: Array, fluid: Array) -> float:
        """The share of the shell around a lesion (N, 3) that is cortex, or outside of it."""
        reach = np.ceil((SHELL_MM[1] + CORTEX_MM) / self.spacing).astype(int)
        low = np.maximum(voxels.min(0) - reach, 0)
        box = tuple(slice(a, b) for a, b in zip(low, voxels.max(0) + reach + 1, strict=True))
        brain, lesions = self.brain[box], self.lesions[box]
        known = (brain & ~lesions).astype(np.float32)
        around = SMOOTH_MM / self.spacing
        smooth = ndimage.gaussian_filter(np.where(known > 0, self.image[box], 0), around)
        smooth /= np.maximum(ndimage.gaussian_filter(known, around), 1e-3)
        outer = fluid[box] | ~brain
        depth = ndimage.distance_transform_edt(~outer, self.spacing) if outer.any() else np.full(brain.shape, np.inf)
        cortex = (outer | (smooth < self.white)) & (depth <= CORTEX_MM)
        own = np.ones(brain.shape, bool)
        own[tuple((voxels - low).T)] = False
        away = ndimage.distance_transform_edt(own, self.spacing)
        shell = (away > SHELL_MM[0]) & (away <= SHELL_MM[1]) & ~lesions
        return float(cortex[shell].mean()) if shell.any() else 0.0


def _brain(tissue: Array) -> Array:
    """The brain with its fluid, of the tissue of a skull-stripped image: the largest component."""
    labels, count = ndimage.label(tissue)
    return labels == np.bincount(labels.ravel())[1:].argmax() + 1 if count > 1 else labels > 0


def _whole(brain: Array, lengths: Array) -> str:
    """Why the brain, so many mm wide, long and high, is not a whole one, or nothing."""
    if not all(low <= length <= high for length, (low, high) in zip(lengths, SIZES_MM, strict=True)):
        words = " × ".join(f"{length:.0f}" for length in lengths)
        return f"Regions are told on the scan of a whole adult brain, and here {words} mm of brain are seen."
    for axis in range(3):
        for end in (0, -1):
            if (axis, end) != (2, 0) and brain.take(end, axis).mean() > TOUCHING:
                return "Regions are told on the scan of a whole brain, and this one is cut off by the field of view."
    return ""


def _ventricles(fluid: Array, brain: Array, spacing: Array, zero: Array, scale: Array) -> Array | None:
    """The lateral ventricles, or None where nothing can be them."""
    steps = np.maximum(1, np.round(COARSE_MM / spacing)).astype(int)
    every = tuple(slice(None, None, step) for step in steps)
    size = spacing * steps
    depth = ndimage.distance_transform_edt(np.pad(brain[every], 1), size)[1:-1, 1:-1, 1:-1]
    x, y, z = ((np.arange(0, n, s) - o) * f for n, s, o, f in zip(brain.shape, steps, zero, scale, strict=True))
    inside = (np.abs(x) < 44)[:, None, None] & ((y < -25) & (y > -140))[None, :, None] & ((z < -28) & (z > -100))
    # A share of each coarse voxel, so that a thin horn is not lost between two samples.
    share = ndimage.uniform_filter(fluid.astype(np.float32), steps)[every] if (steps > 1).any() else fluid[every]
    candidates = (share > 0.5) & (depth > DEEP_MM) & inside
    labels, count = ndimage.label(candidates)
    if not count:
        return None
    sizes = np.bincount(labels.ravel())[1:]
    largest = int(sizes.argmax()) + 1
    # The two sides meet in a passage that is thinner than a voxel: the larger part on each side belongs.
    kept = {largest}
    for side in (x < -3, x > 3):
        there = np.bincount(labels[side].ravel(), minlength=count + 1)[1:]
        if there.max() > 0.1 * sizes.max():
            kept.add(int(there.argmax()) + 1)
    coarse = ndimage.binary_dilation(np.isin(labels, list(kept)), iterations=1)
    near = np.zeros(brain.shape, bool)
    fine = np.kron(coarse, np.ones(steps, bool))[tuple(slice(n) for n in brain.shape)]
    near[tuple(slice(n) for n in fine.shape)] = fine
    ventricles = near & fluid
    volume = np.count_nonzero(ventricles) * spacing.prod() / 1000
    return ventricles if VENTRICLES_ML[0] <= volume <= VENTRICLES_ML[1] else None


def _grown(mask: Array, spacing: Array) -> Array:
    """A mask and what lies within about 4 mm of it."""
    steps = 2 * np.maximum(1, np.round(4 / spacing)).astype(int) + 1
    return ndimage.maximum_filter(mask, steps)


def _surface(mask: Array) -> Array:
    """The voxels of a mask that have a neighbour outside by a face."""
    return mask & ~ndimage.binary_erosion(mask, border_value=1)


def _is_infratentorial(middle: Array) -> bool:
    """Whether a point is in the brainstem or the cerebellum: below the tentorium, in mm from the zero of the box."""
    x, y, z = abs(middle[0]), middle[1], middle[2]
    return bool(z < -78 - 0.3 * x and (y < -108 or (x < 20 and y < -80)))
