"""What became of the lesions of one session in the next: new, enlarged, shrunk, stable, vanished."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from nibabel.affines import apply_affine
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from rsanet.segment.html.lesions import Lesion, list_lesions
from rsanet.segment.html.mosaics import choose_slices, draw_slice
from rsanet.segment.html.pictures import PLANES, Frame, Picture
from rsanet.segment.html.scan import Scan
from rsanet.segment.metrics import Protocol

Array = np.ndarray

# Words of the tables and legends, what needs attention first.
FATES = {
    "new": "new",
    "enlarged": "enlarged",
    "vanished": "vanished",
    "shrunk": "shrunk",
    "stable": "stable",
    "tiny": "new, but too small to count",
    "unseen": "outside this session's field of view",
}
PAIRS = 8  # of slices drawn beside each other
LITTLE_CHANGE = ("stable", "tiny", "unseen")


@dataclass(frozen=True)
class Criteria:
    """When a lesion has changed.

    In lesions measured repeatedly by hand, a change of a small one below some 45 % of its area may be chance (Arch
    Neurol 1992;49:261); hence the growth, and its inverse for loss. The least volumes keep single voxels from counting.

    Attributes:
        new_mm3: a lesion without predecessor is new from this volume on.
        growth: a lesion is enlarged where it grew by this share of its volume, and shrunk where undoing it would take
            as much growth.
        change_mm3: and by this volume.
    """

    new_mm3: float = 3.0
    growth: float = 0.5
    change_mm3: float = 10.0

    def describe(self) -> str:
        """The sentences to print beside the numbers."""
        less = 100 * (1 - 1 / (1 + self.growth))
        return (
            f"New: no voxel in common with a lesion of the session before, and at least {self.new_mm3:g} mm³. "
            f"Enlarged: at least {100 * self.growth:.0f} % and {self.change_mm3:g} mm³ more than before. Shrunk: at "
            f"least {less:.0f} % and {self.change_mm3:g} mm³ less. Vanished: no voxel in common with a lesion of this "
            f"session, and at least {self.new_mm3:g} mm³. Lesions that merged or split are compared together. The "
            "thresholds are this program's; no registration is done: the sessions' headers have to put them in one "
            "space."
        )

    def judge(self, before_mm3: float, now_mm3: float) -> str:
        """The fate of lesions that have common voxels, from their volume in both sessions."""
        change = now_mm3 - before_mm3
        # Volumes are products of rounded voxel sizes: exactly the threshold is enough.
        slack = 1 - 1e-6
        if change >= self.change_mm3 * slack and now_mm3 >= before_mm3 * (1 + self.growth) * slack:
            return "enlarged"
        if -change >= self.change_mm3 * slack and before_mm3 >= now_mm3 * (1 + self.growth) * slack:
            return "shrunk"
        return "stable"


@dataclass(frozen=True, eq=False)
class Change:
    """A lesion of this session, or one of the session before that vanished.

    Attributes:
        lesion: it; its voxels are on this session's grid.
        fate: a key of ``FATES``.
        before: ids of the lesions of the session before that it is compared with.
        before_mm3: their volume; for several lesions that are compared together, of all together.
        now_mm3: the volume of this session's lesions that are compared with them.
    """

    lesion: Lesion
    fate: str
    before: tuple[str, ...]
    before_mm3: float
    now_mm3: float


@dataclass(frozen=True, eq=False)
class FollowUp:
    """Two consecutive sessions of a subject.

    Attributes:
        before: name of the earlier session.
        changes: of every lesion of either session.
        counts: number of changes by fate.
        before_mm3: lesion load of the earlier session.
        now_mm3: and of the later one.
        pairs: slices with most change: the earlier session, and the later one.
        criteria: the thresholds.
    """

    before: str
    changes: list[Change]
    counts: dict[str, int]
    before_mm3: float
    now_mm3: float
    pairs: list[tuple[Picture, Picture]]
    criteria: Criteria


def compare_lesions(
    before: Sequence[Lesion],
    now: Sequence[Lesion],
    carry: Array,
    shape: Sequence[int],
    shape_before: Sequence[int],
    criteria: Criteria | None = None,
) -> list[Change]:
    """The fate of every lesion of two sessions.

    Args:
        before: lesions of the earlier session, on its grid.
        now: lesions of the later session, on its own.
        carry: (4, 4) from voxels of the earlier grid to voxels of the later one.
        shape: of the later grid.
        shape_before: of the earlier one.
        criteria: the thresholds.
    """
    criteria = criteria or Criteria()
    moved = [_carried(lesion.voxels, carry, shape) for lesion in before]
    pairs = _overlaps([lesion.voxels for lesion in now], moved, shape)
    # The other way round, too: where one grid is coarser, the middle of a voxel may miss a small lesion on it.
    back = [_carried(lesion.voxels, np.linalg.inv(carry), shape_before) for lesion in now]
    pairs |= {(one, two) for two, one in _overlaps([lesion.voxels for lesion in before], back, shape_before)}
    count = len(now) + len(before)
    rows, columns = np.array([(one, len(now) + two) for one, two in pairs], int).reshape(-1, 2).T
    graph = sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=(count, count))
    groups = connected_components(graph, directed=False)[1]
    changes = []
    for number, lesion in enumerate(now):
        group = groups[number]
        earlier = [one for n, one in enumerate(before) if groups[len(now) + n] == group]
        was = sum(one.volume_mm3 for one in earlier)
        volume = sum(one.volume_mm3 for n, one in enumerate(now) if groups[n] == group)
        fate = criteria.judge(was, volume) if earlier else _if_large("new", lesion, criteria)
        changes.append(Change(lesion, fate, tuple(one.id for one in earlier), was, volume))
    for number, lesion in enumerate(before):
        if groups[len(now) + number] in groups[: len(now)]:
            continue
        fate = _if_large("vanished", lesion, criteria) if len(moved[number]) else "unseen"
        if fate != "tiny":
            there = replace(lesion, id=f"P{lesion.id}", voxels=moved[number])
            changes.append(Change(there, fate, (lesion.id,), lesion.volume_mm3, 0.0))
    return changes


def _if_large(fate: str, lesion: Lesion, criteria: Criteria) -> str:
    return fate if lesion.volume_mm3 >= criteria.new_mm3 * (1 - 1e-6) else "tiny"


def _carried(voxels: Array, carry: Array, shape: Sequence[int]) -> Array:
    """The voxels (N, 3) of another grid that the middles of these lie in; none of those outside of it."""
    there = np.unique(np.round(apply_affine(carry, voxels)).astype(int), axis=0)
    return there[((there >= 0) & (there < shape)).all(1)]


def _overlaps(lesions: Sequence[Array], others: Sequence[Array], shape: Sequence[int]) -> set[tuple[int, int]]:
    """Which lesions (N, 3) have a voxel in common with which others, on one grid; lesions do not overlap each other."""
    owner = np.zeros(shape, np.int32)
    for number, voxels in enumerate(lesions, start=1):
        owner[tuple(voxels.T)] = number
    return {
        (int(number) - 1, other)
        for other, voxels in enumerate(others)
        for number in np.unique(owner[tuple(voxels.T)])
        if number
    }


def follow(
    before: Scan,
    now: Scan,
    lesions: Sequence[Lesion],
    frame: Frame,
    protocol: Protocol,
    criteria: Criteria | None = None,
) -> FollowUp:
    """Compares the predictions of two consecutive sessions.

    Args:
        before: the earlier session.
        now: the later one.
        lesions: those of the later one.
        frame: what part of it is drawn.
        protocol: what a lesion is.
        criteria: the thresholds.
    """
    criteria = criteria or Criteria()
    predicted = [lesion for lesion in lesions if not lesion.id.startswith("R")]
    earlier = [lesion for lesion in list_lesions(before, protocol) if not lesion.id.startswith("R")]
    carry = np.linalg.inv(now.affine) @ before.affine
    shapes = now.prediction.shape, before.prediction.shape
    changes = compare_lesions(earlier, predicted, carry, *shapes, criteria)
    order = list(FATES)
    changes.sort(key=lambda change: (order.index(change.fate), -change.lesion.volume_mm3))
    counts = {fate: sum(change.fate == fate for change in changes) for fate in FATES}
    loads = [sum(lesion.volume_mm3 for lesion in every) for every in (earlier, predicted)]
    pairs = _draw_pairs(before, now, earlier, changes, carry, frame)
    return FollowUp(before.name, changes, counts, *loads, pairs, criteria)


def _draw_pairs(
    before: Scan, now: Scan, earlier: Sequence[Lesion], changes: Sequence[Change], carry: Array, frame: Frame
) -> list[tuple[Picture, Picture]]:
    """Axial slices of this session that show what changed, each with the same place in the session before."""
    plane = PLANES[0]
    there = [change for change in changes if len(change.lesion.voxels)]
    changed = [change.lesion.voxels for change in there if change.fate not in LITTLE_CHANGE]
    chosen = choose_slices(changed, plane.axis, PAIRS)
    if not chosen:
        return []
    image = _resampled(before, now)
    own = Frame.around(before.image, before.spacing)
    frame_before = replace(frame, white=own.white, black=own.black)
    fate_before = {name: change.fate for change in changes for name in change.before}
    left = [
        (f"P{lesion.id}", fate_before.get(lesion.id, "stable"), _carried(lesion.voxels, carry, now.prediction.shape))
        for lesion in earlier
    ]
    right = [(change.lesion.id, change.fate, change.lesion.voxels) for change in there if change.fate != "vanished"]
    return [
        (
            draw_slice(now, image, index, plane, frame_before, left),
            draw_slice(now, now.image, index, plane, frame, right),
        )
        for index in chosen
    ]


def _resampled(before: Scan, now: Scan) -> Array:
    """The earlier image on the later grid, by the headers."""
    from scipy import ndimage

    if before.prediction.shape == now.prediction.shape and np.allclose(before.affine, now.affine, rtol=0, atol=1e-3):
        return before.image
    carry = np.linalg.inv(before.affine) @ now.affine
    return ndimage.affine_transform(before.image, carry[:3, :3], carry[:3, 3], now.prediction.shape, order=1)
