"""How well one lesion mask agrees with a reference: voxel by voxel, surface by surface and lesion by lesion.

Lesion-wise numbers have no one definition: which voxels form one lesion, what counts as found, and what is
too small to count differ between challenges. A :class:`Protocol` names these three, and is printed with the
numbers.

Empty masks: Dice is 1 if both masks are empty and 0 if one is. A ratio whose denominator is zero is NaN:
sensitivity, relative volume differences and LTPR without a reference, PPV and LFPR without a prediction. Distances
need a surface in both masks and are NaN otherwise. The lesion-wise F1 is 0 if only one mask has lesions, and NaN if
neither has. Volumes, their difference in mm³ and counts are always defined. Summaries of several cases leave NaN out
and say how many cases are left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import ndimage, sparse
from scipy.spatial import KDTree

from rsanet.segment.geometry import affine_of, places, to_canonical, voxel_volume
from rsanet.segment.volumes import as_mask

Array = np.ndarray

CONNECTIVITY_RANK = {6: 1, 18: 2, 26: 3}
RULES = ("iou", "msseg")
# Commowick et al. 2018: how far a lesion's partners may reach beyond the other mask, and the share of the common
# voxels that must come from partners that do not.
MSSEG_OUTSIDE, MSSEG_CONTRIBUTION = 0.70, 0.65

# Lower bounds in mm³, each class up to the next. Nair et al. 2020 call lesions of up to 10 voxels small, of up to 50
# medium and above large; the large ones are parted once more.
SIZE_CLASSES = (0.0, 10.0, 50.0, 100.0)


@dataclass(frozen=True)
class Protocol:
    """What a lesion is, and when it is found.

    Attributes:
        name: name of the protocol.
        connectivity: 6, 18 or 26 neighbours join voxels into one lesion.
        overlap: for rule iou, 0 where any common voxel detects a lesion, otherwise the least intersection over union
            of a reference lesion with one predicted lesion. For rule msseg, the share of a lesion that the other
            mask has to exceed.
        minimum_mm3: lesions below this volume, in either mask, are left out of the lesion-wise numbers; for rule
            msseg those of exactly this volume, too.
        rule: iou, or msseg for the rule of Commowick et al. 2018, see ``detect_msseg``.
        note: what else to know before comparing with published numbers.

    Raises:
        ValueError: a value is out of its range.
    """

    name: str = "custom"
    connectivity: int = 26
    overlap: float = 0.0
    minimum_mm3: float = 0.0
    rule: str = "iou"
    note: str = ""

    def __post_init__(self) -> None:
        if self.connectivity not in CONNECTIVITY_RANK:
            raise ValueError(f"connectivity is {self.connectivity}: give 6, 18 or 26.")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap is {self.overlap}: give 0 for any overlap, or a least overlap of up to 1.")
        if not (math.isfinite(self.minimum_mm3) and self.minimum_mm3 >= 0):
            raise ValueError(f"minimum_mm3 is {self.minimum_mm3}: give a volume in mm³, 0 for no minimum.")
        if self.rule not in RULES:
            raise ValueError(f"rule is {self.rule!r}: give one of {', '.join(RULES)}.")

    def describe(self) -> str:
        """One line to print beside the numbers."""
        if self.rule == "msseg":
            detection = (
                f"if more than {100 * self.overlap:g} % is covered and the lesions with the first "
                f"{100 * MSSEG_CONTRIBUTION:g} % of the cover lie at most {100 * MSSEG_OUTSIDE:g} % outside"
            )
        else:
            detection = f"by IoU of at least {self.overlap:g}" if self.overlap else "by any overlap"
        bound = "up to" if self.rule == "msseg" else "below"
        least = f"lesions {bound} {self.minimum_mm3:g} mm³ left out" if self.minimum_mm3 else "no minimum size"
        line = f"Protocol {self.name}: {self.connectivity}-connected lesions, detected {detection}, {least}."
        return f"{line} {self.note}" if self.note else line


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("custom"),
        Protocol("isbi2015", connectivity=18, note="Carass et al. 2017."),
        Protocol(
            "msseg2016",
            connectivity=6,
            overlap=0.10,
            minimum_mm3=3.0,
            rule="msseg",
            note="Commowick et al. 2018, in the details after animaSegPerfAnalyzer, with which it was not compared.",
        ),
        Protocol(
            "wmh2017",
            connectivity=26,
            note="Kuijf et al. 2019; the challenge also masks other pathology, and takes surfaces slice by slice.",
        ),
        Protocol(
            "shifts",
            connectivity=6,
            overlap=0.25,
            note="Malinin et al. 2022; their F1 counts hits among predicted lesions alone.",
        ),
    )
}


def choose_protocol(name: str = "custom", **changes: float | None) -> Protocol:
    """A preset by name, or one with changes, which is then called custom.

    Args:
        name: a key of ``PROTOCOLS``.
        **changes: ``connectivity``, ``overlap``, ``minimum_mm3``; None keeps the preset's.

    Raises:
        ValueError: there is no such preset, or a change is out of its range.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol is {name!r}: give one of {', '.join(PROTOCOLS)}.")
    preset = PROTOCOLS[name]
    changes = {key: value for key, value in changes.items() if value not in (None, getattr(preset, key))}
    return replace(preset, name="custom", note="", **changes) if changes else preset


@dataclass(frozen=True)
class SizeClass:
    """Lesion-wise numbers of one class of lesion volumes.

    Reference lesions are classed by their own volume, and so are predicted ones. The F1 joins the two: how well
    lesions of this size are found, and how far predictions of this size can be trusted.

    Attributes:
        low_mm3: least volume of the class.
        high_mm3: volume from which on lesions belong to the next class; infinite in the last.
        reference_lesions: number of reference lesions.
        detected_lesions: those that the prediction found.
        predicted_lesions: number of predicted lesions.
        false_lesions: those that found none.
    """

    low_mm3: float
    high_mm3: float
    reference_lesions: int
    detected_lesions: int
    predicted_lesions: int
    false_lesions: int

    @property
    def name(self) -> str:
        """``<10``, ``10-50`` or ``>=100``, in mm³."""
        if not self.low_mm3:
            return f"<{self.high_mm3:g}"
        return f">={self.low_mm3:g}" if math.isinf(self.high_mm3) else f"{self.low_mm3:g}-{self.high_mm3:g}"

    @property
    def ltpr(self) -> float:
        """Detected / reference lesions."""
        return _ratio(self.detected_lesions, self.reference_lesions)

    @property
    def lfpr(self) -> float:
        """False / predicted lesions."""
        return _ratio(self.false_lesions, self.predicted_lesions)

    @property
    def lesion_f1(self) -> float:
        """Harmonic mean of LTPR and 1 - LFPR."""
        return _lesion_f1(self.ltpr, self.lfpr)


@dataclass(frozen=True)
class CaseMetrics:
    """The numbers of one case. ``nan`` is a number without a definition there.

    Attributes:
        subject: name of the case.
        dice: 2 |P ∩ R| / (|P| + |R|).
        ppv: |P ∩ R| / |P|, the precision of the predicted voxels.
        tpr: |P ∩ R| / |R|, the sensitivity.
        hd95_mm: 95th percentile of the Hausdorff distance: the larger of the two directed ones, between the centres
            of the voxels that have a neighbour outside by a face.
        assd_mm: average symmetric surface distance, the mean over the surface voxels of both masks.
        reference_mm3: lesion load of the reference.
        predicted_mm3: lesion load of the prediction.
        volume_error_mm3: |P| - |R|.
        relative_volume_error: (|P| - |R|) / |R|.
        volume_difference: | |P| - |R| | / |R|, the absolute volume difference of the challenges.
        reference_lesions: number of lesions in the reference.
        predicted_lesions: number of lesions in the prediction.
        detected_lesions: reference lesions that the prediction found.
        false_lesions: predicted lesions that found none.
        ltpr: detected / reference lesions, the lesion-wise sensitivity.
        lfpr: false / predicted lesions, the lesion-wise false discovery rate; challenges call it LFPR.
        lesion_f1: harmonic mean of LTPR and 1 - LFPR; 0 if only one of the masks has lesions.
        size_classes: the lesion-wise numbers by lesion volume.
    """

    subject: str
    dice: float
    ppv: float
    tpr: float
    hd95_mm: float
    assd_mm: float
    reference_mm3: float
    predicted_mm3: float
    volume_error_mm3: float
    relative_volume_error: float
    volume_difference: float
    reference_lesions: int
    predicted_lesions: int
    detected_lesions: int
    false_lesions: int
    ltpr: float
    lfpr: float
    lesion_f1: float
    size_classes: tuple[SizeClass, ...] = ()


# --- voxels -----------------------------------------------------------------------------------------------


def dice(one: Any, other: Any) -> float:
    """Dice of two boolean arrays or tensors; 1 where both are empty."""
    total = int(one.sum() + other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0


def evaluate_case(
    pred: Array,
    ref: Array,
    spacing: Sequence[float] | Array,
    protocol: Protocol = PROTOCOLS["custom"],
    *,
    subject: str = "",
) -> CaseMetrics:
    """Compare a predicted lesion mask with a reference on the same voxel grid.

    Args:
        pred: (X, Y, Z), 0 and one other number.
        ref: same shape, likewise.
        spacing: three voxel sizes in mm; or the affine (4, 4), which says how voxels are sheared, too.
        protocol: how lesions are counted.
        subject: name of the case.

    Raises:
        ValueError: a mask is not binary or not 3-D, the shapes differ, or the spacing is neither.
    """
    pred, ref = as_mask(pred, "The prediction"), as_mask(ref, "The reference")
    if pred.shape != ref.shape:
        raise ValueError(
            f"The prediction has shape {pred.shape} and the reference {ref.shape}: "
            "bring the prediction to the reference's grid."
        )
    stored = affine_of(spacing)
    # In one order of axes, so that sums do not depend on how a file stores them.
    (pred, affine), (ref, _) = to_canonical(pred, stored), to_canonical(ref, stored)
    pred, ref = _crop(pred, ref)
    voxel_mm3 = voxel_volume(affine)
    both, predicted, reference = (int(np.count_nonzero(mask)) for mask in (pred & ref, pred, ref))
    hd95, assd = surface_distances(pred, ref, affine)
    lesions = Lesions.match(pred, ref, voxel_mm3, protocol)
    counts = lesions.count()
    ltpr = _ratio(counts["detected_lesions"], counts["reference_lesions"])
    lfpr = _ratio(counts["false_lesions"], counts["predicted_lesions"])
    bounds = (*SIZE_CLASSES, math.inf)
    return CaseMetrics(
        subject=subject,
        dice=dice(pred, ref),
        ppv=_ratio(both, predicted),
        tpr=_ratio(both, reference),
        hd95_mm=hd95,
        assd_mm=assd,
        reference_mm3=reference * voxel_mm3,
        predicted_mm3=predicted * voxel_mm3,
        volume_error_mm3=(predicted - reference) * voxel_mm3,
        relative_volume_error=_ratio(predicted - reference, reference),
        volume_difference=_ratio(abs(predicted - reference), reference),
        **counts,
        ltpr=ltpr,
        lfpr=lfpr,
        lesion_f1=_lesion_f1(ltpr, lfpr),
        size_classes=tuple(SizeClass(low, high, **lesions.count(low, high)) for low, high in pairwise(bounds)),
    )


def _crop(pred: Array, ref: Array) -> tuple[Array, Array]:
    """Both masks within their common bounding box: most of a brain holds no lesion."""
    either = pred | ref
    box = []
    for axis in range(3):
        used = np.flatnonzero(either.any(axis=tuple({0, 1, 2} - {axis})))
        box.append(slice(used[0], used[-1] + 1) if used.size else slice(0, 0))
    return pred[tuple(box)], ref[tuple(box)]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


# --- surfaces ---------------------------------------------------------------------------------------------


def surface_distances(pred: Array, ref: Array, spacing: Sequence[float] | Array) -> tuple[float, float]:
    """HD95 and ASSD of two masks.

    The surface of a mask is its voxels with a neighbour outside by a face; the border of the volume is outside.
    Distances are those between voxel centres in the world, exact on anisotropic and on sheared voxels.

    Args:
        pred: (X, Y, Z), boolean.
        ref: same shape.
        spacing: three voxel sizes in mm, or the affine (4, 4).

    Returns:
        In mm, the larger of the two directed 95th percentiles, and the mean over the surface voxels of both masks;
        NaN where a mask is empty.
    """
    if not (pred.any() and ref.any()):
        return math.nan, math.nan
    affine = affine_of(spacing)
    points = [places(np.argwhere(mask & ~ndimage.binary_erosion(mask)), affine) for mask in (pred, ref)]
    # A tree over the surface voxels takes a tenth of the time of a distance transform of the box around them.
    to_ref, to_pred = KDTree(points[1]).query(points[0])[0], KDTree(points[0]).query(points[1])[0]
    hd95 = max(np.percentile(to_ref, 95), np.percentile(to_pred, 95))
    return float(hd95), float(np.concatenate((to_ref, to_pred)).mean())


# --- lesions ----------------------------------------------------------------------------------------------


def label_lesions(mask: Array, connectivity: int = 26) -> tuple[Array, int]:
    """Number the connected components of a mask from 1; returns the labels and their count."""
    structure = ndimage.generate_binary_structure(3, CONNECTIVITY_RANK[connectivity])
    labels, count = ndimage.label(mask, structure)
    return labels, int(count)


@dataclass(frozen=True)
class Lesions:
    """The lesions of both masks that count, and which of them have a partner.

    Attributes:
        ref_mm3: (R,), volumes of the reference lesions.
        detected: (R,), which of them the prediction found.
        pred_mm3: (P,), volumes of the predicted lesions.
        correct: (P,), which of them found a reference lesion.
    """

    ref_mm3: Array
    detected: Array
    pred_mm3: Array
    correct: Array

    @classmethod
    def match(cls, pred: Array, ref: Array, voxel_mm3: float, protocol: Protocol) -> "Lesions":
        """Find the lesions of two masks, and match them by the protocol's rule.

        A lesion may match several: one large prediction over two reference lesions detects both under any overlap.
        """
        pred_labels, pred_sizes = large_lesions(pred, voxel_mm3, protocol)
        ref_labels, ref_sizes = large_lesions(ref, voxel_mm3, protocol)
        common = (pred_labels > 0) & (ref_labels > 0)
        pairs = (ref_labels[common] - 1, pred_labels[common] - 1)
        shared = sparse.coo_array((np.ones(pairs[0].size, np.int64), pairs), shape=(ref_sizes.size, pred_sizes.size))
        shared.sum_duplicates()
        rows, columns, voxels = shared.row, shared.col, shared.data
        if protocol.rule == "msseg":
            detected = detect_msseg(rows, columns, voxels, ref_sizes, pred_sizes, protocol.overlap)
            correct = detect_msseg(columns, rows, voxels, pred_sizes, ref_sizes, protocol.overlap)
        else:
            union = ref_sizes[rows] + pred_sizes[columns] - voxels
            hit = voxels / union >= protocol.overlap
            detected, correct = np.zeros(ref_sizes.size, bool), np.zeros(pred_sizes.size, bool)
            detected[rows[hit]] = True
            correct[columns[hit]] = True
        return cls(ref_sizes * voxel_mm3, detected, pred_sizes * voxel_mm3, correct)

    def count(self, low_mm3: float = 0.0, high_mm3: float = math.inf) -> dict[str, int]:
        """The counts of the lesions from one volume on and below another."""
        # Volumes are products of rounded voxel sizes: a lesion of exactly a bound belongs above it.
        low, high = low_mm3 * (1 - 1e-6), high_mm3 * (1 - 1e-6)
        reference = (self.ref_mm3 >= low) & (self.ref_mm3 < high)
        predicted = (self.pred_mm3 >= low) & (self.pred_mm3 < high)
        return {
            "reference_lesions": int(reference.sum()),
            "predicted_lesions": int(predicted.sum()),
            "detected_lesions": int((reference & self.detected).sum()),
            "false_lesions": int((predicted & ~self.correct).sum()),
        }


def detect_msseg(rows: Array, columns: Array, voxels: Array, sizes: Array, other_sizes: Array, least: float) -> Array:
    """Which lesions of one mask the other detects, by the rule of the MICCAI 2016 challenge (Commowick et al. 2018).

    More than the share ``least`` of a lesion has to be covered. Then the lesions that cover it are gone through from
    the largest common part down until they make up 65 % of what is covered, and none of these may have more than
    70 % of its voxels outside the lesions of this mask. Of two with equal parts the one less outside comes first.

    Args:
        rows: (N,), for each pair of lesions with common voxels, the lesion of this mask.
        columns: (N,), the lesion of the other mask.
        voxels: (N,), number of common voxels.
        sizes: (R,), voxels of this mask's lesions.
        other_sizes: (P,), voxels of the other mask's lesions.
        least: share of a lesion that has to be exceeded.

    Returns:
        (R,), boolean.
    """
    inside = np.bincount(columns, weights=voxels, minlength=other_sizes.size)
    outside = (other_sizes - inside) / np.maximum(other_sizes, 1)
    detected = np.zeros(sizes.size, bool)
    for lesion in np.unique(rows):
        partners = np.flatnonzero(rows == lesion)
        partners = partners[np.lexsort((outside[columns[partners]], -voxels[partners]))]
        covered = voxels[partners].sum()
        before = np.cumsum(voxels[partners]) - voxels[partners]  # what larger parts cover already
        needed = partners[before / covered < MSSEG_CONTRIBUTION]
        detected[lesion] = covered / sizes[lesion] > least and (outside[columns[needed]] <= MSSEG_OUTSIDE).all()
    return detected


def large_lesions(mask: Array, voxel_mm3: float, protocol: Protocol) -> tuple[Array, Array]:
    """The lesions that count: labels from 1 without a gap, 0 elsewhere, and the voxels of each lesion."""
    labels, count = label_lesions(mask, protocol.connectivity)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    # A lesion of exactly the minimum is one, whatever the rounding of the voxel volume.
    slack = 1e-6 if protocol.rule == "msseg" else -1e-6
    kept = sizes * voxel_mm3 > protocol.minimum_mm3 * (1 + slack)
    numbers = np.concatenate(([0], np.where(kept, np.cumsum(kept), 0)))
    return numbers[labels], sizes[kept]


def _lesion_f1(ltpr: float, lfpr: float) -> float:
    if math.isnan(ltpr) and math.isnan(lfpr):
        return math.nan
    if math.isnan(ltpr) or math.isnan(lfpr) or ltpr + 1 - lfpr == 0:
        return 0.0
    return 2 * ltpr * (1 - lfpr) / (ltpr + 1 - lfpr)
