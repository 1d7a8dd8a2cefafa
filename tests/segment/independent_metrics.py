"""The numbers of `rsanet evaluate` a second time, from the words of the protocols, over plain sets of voxels.

No array library, no labelling of components, no distance transform: a mask is a set of coordinates, a lesion a set that
a flood fills, and a surface is searched pair by pair. Ratios of counts are exact fractions until they are returned.
"""

import math
from fractions import Fraction
from itertools import product

NAN = math.nan

# Carass et al. 2017 (ISBI 2015), Commowick et al. 2018 (MICCAI 2016), Kuijf et al. 2019 (WMH 2017), Malinin et al. 2022
# (Shifts): along how many axes two voxels of one lesion may differ, what finds a lesion, and how small it may be.
RULES = {
    "custom": (3, "touch", 0),
    "isbi2015": (2, "touch", 0),
    "msseg2016": (1, "msseg", 3),
    "wmh2017": (3, "touch", 0),
    "shifts": (1, Fraction(1, 4), 0),
}


def voxels(mask):
    """The coordinates of a nested sequence's ones."""
    return {
        (x, y, z)
        for x, plane in enumerate(mask)
        for y, line in enumerate(plane)
        for z, value in enumerate(line)
        if value
    }


def flood(mask, axes):
    """The lesions of a mask: what a flood reaches from any voxel by steps along up to ``axes`` axes at once."""
    steps = [step for step in product((-1, 0, 1), repeat=3) if 0 < sum(map(abs, step)) <= axes]
    dry, lesions = set(mask), []
    while dry:
        front = {dry.pop()}
        lesion = set(front)
        while front:
            near = {tuple(a + b for a, b in zip(voxel, step, strict=True)) for voxel in front for step in steps}
            front = near & dry
            dry -= front
            lesion |= front
        lesions.append(frozenset(lesion))
    return lesions


def large(lesions, voxel_mm3, least_mm3, above):
    """The lesions of at least a volume, or ``above`` it."""
    least = Fraction(str(least_mm3)) / Fraction(str(voxel_mm3))
    return [lesion for lesion in lesions if (len(lesion) > least if above else len(lesion) >= least)]


def touched(lesion, others):
    return any(lesion & other for other in others)


def matched(lesion, others, least):
    """Whether the intersection over union with any other reaches a share."""
    return any(lesion & other and Fraction(len(lesion & other), len(lesion | other)) >= least for other in others)


def found_by_msseg(lesion, others, same):
    """Commowick et al. 2018: whether the lesions ``others`` of one mask find a lesion of the mask ``same``.

    More than a tenth of it is covered; and of what covers it, from the largest part down until 65 % of the cover is
    accounted for, nothing lies to more than 70 % outside of the lesion's own mask.
    """
    everywhere = set().union(*same)
    parts = []
    for other in others:
        if lesion & other:
            parts.append((len(lesion & other), Fraction(len(other - everywhere), len(other))))
    cover = sum(part for part, _ in parts)
    if not Fraction(cover, len(lesion)) > Fraction(10, 100):
        return False
    accounted = 0
    for part, outside in sorted(parts, key=lambda entry: (-entry[0], entry[1])):
        if Fraction(accounted, cover) >= Fraction(65, 100):
            break
        if outside > Fraction(70, 100):
            return False
        accounted += part
    return True


def surface(mask):
    """The voxels that show a face: at least one of six neighbours is not in the mask."""
    faces = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    return [v for v in sorted(mask) if any((v[0] + a, v[1] + b, v[2] + c) not in mask for a, b, c in faces)]


def percentile(values, share):
    """Between the two values that a rank falls between, in proportion."""
    values = sorted(values)
    rank = (len(values) - 1) * share
    low = math.floor(rank)
    high = min(low + 1, len(values) - 1)
    return values[low] + (rank - low) * (values[high] - values[low])


def edges_of(spacing):
    """The edges of a voxel as vectors in mm, of three sizes or of the rows of an affine."""
    if len(spacing) == 3:
        return [tuple(size if n == axis else 0 for n in range(3)) for axis, size in enumerate(spacing)]
    return [tuple(row[axis] for row in spacing[:3]) for axis in range(3)]


def volume_of(spacing):
    """The volume between the three edges of a voxel."""
    if len(spacing) == 3:
        return math.prod(spacing)
    (a, b, c), (d, e, f), (g, h, i) = edges_of(spacing)
    return abs(a * (e * i - f * h) + b * (f * g - d * i) + c * (d * h - e * g))


def distances(pred, ref, spacing):
    """HD95 and ASSD in mm: every surface voxel to the nearest one of the other mask."""
    if not pred or not ref:
        return NAN, NAN
    ones, others = surface(pred), surface(ref)

    edges = edges_of(spacing)

    def apart(one, other):
        steps = [a - b for a, b in zip(one, other, strict=True)]
        return math.hypot(*(sum(edge[n] * step for edge, step in zip(edges, steps, strict=True)) for n in range(3)))

    there = [min(apart(one, other) for other in others) for one in ones]
    back = [min(apart(one, other) for one in ones) for other in others]
    return max(percentile(there, 0.95), percentile(back, 0.95)), sum(there + back) / (len(there) + len(back))


def ratio(part, whole):
    return float(Fraction(part, whole)) if whole else NAN


def case(pred, ref, spacing, name="custom", *, axes=None, least_iou=None, least_mm3=None):
    """The numbers of a case, by the names that `rsanet evaluate` gives them.

    Args:
        pred: set of coordinates.
        ref: likewise.
        spacing: mm, or the rows of an affine.
        name: of the protocol.
        axes: along how many axes voxels of one lesion may differ; the protocol's by default.
        least_iou: likewise.
        least_mm3: likewise.
    """
    own_axes, rule, own_mm3 = RULES[name]
    axes, least_mm3 = axes or own_axes, own_mm3 if least_mm3 is None else least_mm3
    rule = least_iou if least_iou else rule
    voxel_mm3 = volume_of(spacing)
    here, there = (large(flood(mask, axes), voxel_mm3, least_mm3, rule == "msseg") for mask in (pred, ref))

    def found(lesion, others, same):
        if rule == "touch":
            return touched(lesion, others)
        return found_by_msseg(lesion, others, same) if rule == "msseg" else matched(lesion, others, rule)

    detected = sum(found(lesion, here, there) for lesion in there)
    false = sum(not found(lesion, there, here) for lesion in here)
    ltpr, lfpr = ratio(detected, len(there)), ratio(false, len(here))
    if not here or not there:
        f1 = NAN if not here and not there else 0.0
    else:
        recall, precision = Fraction(detected, len(there)), 1 - Fraction(false, len(here))
        f1 = float(2 * recall * precision / (recall + precision)) if recall + precision else 0.0
    hd95, assd = distances(pred, ref, spacing)
    return {
        "dice": ratio(2 * len(pred & ref), len(pred) + len(ref)) if pred or ref else 1.0,
        "ppv": ratio(len(pred & ref), len(pred)),
        "tpr": ratio(len(pred & ref), len(ref)),
        "hd95_mm": hd95,
        "assd_mm": assd,
        "reference_mm3": len(ref) * voxel_mm3,
        "predicted_mm3": len(pred) * voxel_mm3,
        "volume_error_mm3": (len(pred) - len(ref)) * voxel_mm3,
        "relative_volume_error": ratio(len(pred) - len(ref), len(ref)),
        "volume_difference": ratio(abs(len(pred) - len(ref)), len(ref)),
        "reference_lesions": len(there),
        "predicted_lesions": len(here),
        "detected_lesions": detected,
        "false_lesions": false,
        "ltpr": ltpr,
        "lfpr": lfpr,
        "lesion_f1": f1,
    }


def isbi_score(cases):
    """Carass et al. 2017: of the means over the cases that have them, and the correlation of the volumes."""

    def mean(name):
        values = [numbers[name] for numbers in cases if not math.isnan(numbers[name])]
        return sum(values) / len(values)

    pairs = [(numbers["predicted_mm3"], numbers["reference_mm3"]) for numbers in cases]
    centres = [sum(values) / len(pairs) for values in zip(*pairs, strict=True)]
    away = [(one - centres[0], other - centres[1]) for one, other in pairs]
    squares = [math.sqrt(sum(values[i] ** 2 for values in away)) for i in (0, 1)]
    correlation = sum(one * other for one, other in away) / (squares[0] * squares[1])
    return mean("dice") / 8 + mean("ppv") / 8 + (1 - mean("lfpr")) / 4 + mean("ltpr") / 4 + correlation / 4
