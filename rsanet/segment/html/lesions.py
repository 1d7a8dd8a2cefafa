"""The lesions of a page: each with its place, size, probability, and what the reference says of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage

from rsanet.segment.html.scan import Scan
from rsanet.segment.metrics import Lesions, Protocol, label_lesions, large_lesions

Array = np.ndarray

# What a lesion can be, in the order of legends. The words stand in legends and tables.
STATUS = {
    "predicted": "predicted",
    "hit": "true positive",
    "false": "false positive",
    "missed": "missed",
    "uncounted": "too small to count",
    "reference": "reference, found",
}


@dataclass(frozen=True, eq=False)
class Lesion:
    """A connected component of a mask.

    Attributes:
        id: ``1``, ``2``, ... of the prediction, the largest first; ``R1``, ... of the reference.
        status: a key of ``STATUS``.
        voxels: (N, 3) its voxels on the scan's grid.
        volume_mm3: their volume.
        centre_mm: mean of the voxels in world mm: right, anterior, superior.
        centre_voxel: the same as a voxel of the mask's file, counted from 0.
        mean_probability: over the voxels; None without a probability map.
        max_probability: likewise.
    """

    id: str
    status: str
    voxels: Array
    volume_mm3: float
    centre_mm: tuple[float, ...]
    centre_voxel: tuple[float, ...]
    mean_probability: float | None = None
    max_probability: float | None = None


def components(labels: Array) -> Iterator[tuple[int, Array]]:
    """The numbers of labelled lesions and their voxels (N, 3)."""
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            yield number, np.argwhere(labels[box] == number) + [span.start for span in box]


def list_lesions(scan: Scan, protocol: Protocol) -> list[Lesion]:
    """Every lesion of the prediction and then of the reference, the largest first.

    Args:
        scan: the case.
        protocol: what a lesion is, and when it is found, as in ``rsanet evaluate``.
    """
    masks = [mask for mask in (scan.prediction, scan.reference) if mask is not None]
    # Most of a brain holds no lesion.
    box = ndimage.find_objects(np.logical_or.reduce(masks).astype(np.uint8))
    if not box:
        return []
    corner = [span.start for span in box[0]]
    prediction, *reference = (mask[box[0]] for mask in masks)
    if not reference:
        return _of_mask(scan, prediction, corner, protocol, None, ("predicted", "predicted"))
    matched = Lesions.match(prediction, reference[0], scan.voxel_mm3, protocol)
    predicted = _of_mask(scan, prediction, corner, protocol, matched.correct, ("hit", "false"))
    return predicted + _of_mask(scan, reference[0], corner, protocol, matched.detected, ("reference", "missed"), "R")


def _of_mask(
    scan: Scan,
    mask: Array,
    corner: Sequence[int],
    protocol: Protocol,
    partner: Array | None,
    words: tuple[str, str],
    prefix: str = "",
) -> list[Lesion]:
    """The lesions of a mask cut out at a corner; ``words`` are the status of one with a partner and of one without."""
    labels, _ = label_lesions(mask, protocol.connectivity)
    counted, _ = large_lesions(mask, scan.voxel_mm3, protocol)
    found = []
    for _, voxels in components(labels):
        number = counted[tuple(voxels[0])]  # from 1, and 0 where the protocol leaves the lesion out
        status = words[0]
        if partner is not None:
            status = "uncounted" if number == 0 else words[0] if partner[number - 1] else words[1]
        found.append((voxels + corner, status))
    found.sort(key=lambda pair: -len(pair[0]))
    return [_lesion(scan, f"{prefix}{n}", voxels, status) for n, (voxels, status) in enumerate(found, start=1)]


def _lesion(scan: Scan, name: str, voxels: Array, status: str) -> Lesion:
    centre = apply_affine(scan.affine, voxels.mean(0))
    numbers = (None, None)
    if scan.probability is not None:
        values = scan.probability[tuple(voxels.T)]
        numbers = (float(values.mean()), float(values.max()))
    places = (tuple(centre.tolist()), tuple(scan.file_voxel(centre).tolist()))
    return Lesion(name, status, voxels, len(voxels) * scan.voxel_mm3, *places, *numbers)
