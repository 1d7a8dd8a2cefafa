"""What is true of a simulated mask: its lesions, and what became of those of the session before."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from rsanet.segment.geometry import voxel_volume
from rsanet.segment.simulation.painting import NEIGHBOURS

Array = np.ndarray
Entry = dict[str, Any]

HISTORY = ("fate", "before", "volume_before_mm3")  # what an entry says of the session before


def describe_lesions(mask: Array, affine: Array, kinds: Array, names: Sequence[str]) -> list[Entry]:
    """Each 26-connected component of a mask: id, kind, voxels, volume in mm³ and centre in world mm.

    Args:
        mask: (X, Y, Z), non-zero in lesions.
        affine: voxel to world mm.
        kinds: (X, Y, Z) index into ``names`` of the kind of each lesion voxel; the kind of a component is the
            most frequent one.
        names: names of the kinds.
    """
    labels, _ = ndimage.label(mask, NEIGHBOURS)
    voxel_mm3 = voxel_volume(affine)
    described = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[box] == number
        voxels = np.argwhere(inside) + [span.start for span in box]
        centre = affine[:3, :3] @ voxels.mean(0) + affine[:3, 3]
        described.append(
            {
                "id": number,
                "kind": names[int(np.bincount(kinds[box][inside]).argmax())],
                "voxels": len(voxels),
                "volume_mm3": round(len(voxels) * voxel_mm3, 3),
                "centre_mm": [round(float(value), 2) for value in centre],
            }
        )
    return described


def compare_sessions(
    mask: Array, lesions: Sequence[Entry], before: Array, lesions_before: Sequence[Entry]
) -> tuple[list[Entry], list[Entry], Array]:
    """What became of the lesions of one session in the next, on the same grid.

    A lesion is new where it shares no voxel with a lesion of the session before. Otherwise its volume is compared
    with that of all those it shares voxels with; what did not change has the very same voxels.

    Args:
        mask: (X, Y, Z) of the later session.
        lesions: its lesions, as :func:`describe_lesions` gives them.
        before: (X, Y, Z) mask of the earlier session.
        lesions_before: its lesions.

    Returns:
        The later lesions, each with its ``fate`` (new, growing, shrinking or stable), the ids ``before`` and their
        ``volume_before_mm3``; the earlier lesions that vanished; the mask (X, Y, Z) uint8 of the new lesions.
    """
    labels, _ = ndimage.label(mask, NEIGHBOURS)
    labels_before, _ = ndimage.label(before, NEIGHBOURS)
    shared = (labels > 0) & (labels_before > 0)
    pairs = sorted(set(zip(labels[shared].tolist(), labels_before[shared].tolist(), strict=True)))
    volume_before = {lesion["id"]: lesion["volume_mm3"] for lesion in lesions_before}
    followed = []
    for lesion in lesions:
        ids = [earlier for later, earlier in pairs if later == lesion["id"]]
        volume = round(sum(volume_before[number] for number in ids), 3)
        change = lesion["volume_mm3"] - volume
        fate = "new" if not ids else "growing" if change > 0 else "shrinking" if change < 0 else "stable"
        followed.append(lesion | dict(zip(HISTORY, (fate, ids, volume), strict=True)))
    met = {earlier for _, earlier in pairs}
    vanished = [
        {key: value for key, value in lesion.items() if key not in HISTORY}
        for lesion in lesions_before
        if lesion["id"] not in met
    ]
    new = [lesion["id"] for lesion in followed if lesion["fate"] == "new"]
    return followed, vanished, np.isin(labels, new).astype(np.uint8)
