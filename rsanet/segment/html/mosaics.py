"""The slices of a page: as few as show every lesion, and what each plane's projection shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from rsanet.segment.html.lesions import Lesion
from rsanet.segment.html.pictures import PLANES, Frame, Outline, Picture, Plane, coloured, jpeg
from rsanet.segment.html.regions import is_stripped
from rsanet.segment.html.scan import Scan
from rsanet.segment.volumes import tissue_mask
from rsanet.segment.words import counted

Array = np.ndarray

MOST_SLICES = 15  # of a plane; more make a page too long to read
WELL_SEEN = 0.5  # of a lesion's largest area: a slice with less is not chosen for that lesion
EMPTY = (0.35, 0.5, 0.65)  # of the head: the slices that are shown where there are no lesions
PROBABILITY_COLOURS = "magma"
SCALP_MM = 20.0  # of a head whose skull is still there, from the air to the brain
COARSE_MM = 4.0  # grid on which that is measured


@dataclass(frozen=True)
class Mosaic:
    """The slices of one plane.

    Attributes:
        plane: which.
        pictures: from superior, anterior or right on.
        unseen: ids of the lesions that lie in none of them.
    """

    plane: Plane
    pictures: list[Picture]
    unseen: list[str]


def choose_slices(lesions: Sequence[Array], axis: int, most: int = MOST_SLICES) -> list[int]:
    """Slices that show every lesion, as few as a greedy choice finds, from the highest index down.

    Args:
        lesions: voxels (N, 3) of each.
        axis: across the slices.
        most: number of slices; beyond it lesions stay without one, the small and lonely first.
    """
    seen_in: dict[int, set[int]] = {}
    area: dict[int, int] = {}
    for number, voxels in enumerate(lesions):
        indices, counts = np.unique(voxels[:, axis], return_counts=True)
        for index, count in zip(indices.tolist(), counts.tolist(), strict=True):
            area[index] = area.get(index, 0) + count
            if count >= WELL_SEEN * counts.max():
                seen_in.setdefault(index, set()).add(number)
    # Where not all can be shown, specks do not crowd out a lesion.
    width = [len(voxels) ** (1 / 3) for voxels in lesions]
    left = set(range(len(lesions)))
    chosen: list[int] = []
    while left and len(chosen) < most:
        best = max(seen_in, key=lambda index: (sum(width[n] for n in seen_in[index] & left), area[index]))
        chosen.append(best)
        left -= seen_in[best]
    return sorted(chosen, reverse=True)


def draw_mosaics(scan: Scan, lesions: Sequence[Lesion], frame: Frame) -> list[Mosaic]:
    """The slices of all planes, with the outlines of the lesions in them."""
    mosaics = []
    for plane in PLANES:
        # A lesion of the reference that was found is seen with the one that found it.
        needed = [lesion for lesion in lesions if lesion.status != "reference"]
        chosen = choose_slices([lesion.voxels for lesion in needed], plane.axis) or _through_the_head(frame, plane)
        pictures = [draw_slice(scan, scan.image, index, plane, frame, layers(lesions)) for index in chosen]
        shown = {outline.lesion for picture in pictures for outline in picture.outlines}
        unseen = [lesion.id for lesion in needed if lesion.id not in shown]
        mosaics.append(Mosaic(plane, pictures, unseen))
    return mosaics


def _through_the_head(frame: Frame, plane: Plane) -> list[int]:
    first, end = frame.box[plane.axis]
    return sorted({int(first + part * (end - 1 - first)) for part in EMPTY}, reverse=True)


def layers(lesions: Sequence[Lesion]) -> list[tuple[str, str, Array]]:
    """Id, layer and voxels of each lesion; those of the reference come first, beneath the prediction's."""
    ordered = sorted(lesions, key=lambda lesion: not lesion.id.startswith("R"))
    return [(lesion.id, lesion.status, lesion.voxels) for lesion in ordered]


def draw_slice(
    scan: Scan, image: Array, index: int, plane: Plane, frame: Frame, shapes: Sequence[tuple[str, str, Array]]
) -> Picture:
    """A slice with the outlines of what lies in it.

    Args:
        scan: for its place in the world.
        image: (X, Y, Z) on the scan's grid.
        index: of the slice.
        plane: across which it lies.
        frame: what part is drawn.
        shapes: id, layer and voxels (N, 3) of each lesion.
    """
    outlines = []
    for name, layer, voxels in shapes:
        inside = voxels[voxels[:, plane.axis] == index]
        if len(inside):
            outlines.append(Outline(name, layer, frame.outline(inside, plane)))
    place = round(scan.position(plane.axis, index), 1) + 0.0  # no -0
    title = f"{plane.world} = {place:g} mm".replace("-", "−")
    names = list(dict.fromkeys(outline.lesion for outline in outlines))
    words = f"with {'lesion' if len(names) == 1 else 'lesions'} {', '.join(names)}" if names else "without lesions"
    grey = frame.grey(image[(slice(None),) * plane.axis + (index,)], plane)
    alt = f"{plane.name.capitalize()} slice at {title}, {words}"
    return Picture(title, alt, *frame.extent(plane), grey, plane.letters, outlines)


def draw_projections(scan: Scan, lesions: Sequence[Lesion], frame: Frame) -> list[tuple[str, list[Picture]]]:
    """Maximum-intensity projections of the image and, where there is a map, of the probability, with all lesions."""
    rows = {scan.contrast: (_without_scalp(scan.image, scan.spacing), "")}
    if scan.probability is not None:
        rows["Probability of lesion"] = (scan.probability, PROBABILITY_COLOURS)
    return [
        (name, [_project(name, volume, scale, scan, lesions, plane, frame) for plane in PLANES])
        for name, (volume, scale) in rows.items()
    ]


def _without_scalp(image: Array, spacing: Array) -> Array:
    """The image of a whole head without what lies near its surface, which a projection would show alone."""
    head = tissue_mask(image)
    if is_stripped(image, head, spacing):
        return image
    steps = np.maximum(1, np.round(COARSE_MM / spacing)).astype(int)
    coarse = np.pad(head[tuple(slice(None, None, step) for step in steps)], 1)
    deep = ndimage.distance_transform_edt(coarse, spacing * steps)[1:-1, 1:-1, 1:-1] > SCALP_MM
    fine = np.kron(deep, np.ones(steps, bool))[tuple(slice(n) for n in image.shape)]
    return np.where(fine, image, image.min())


def _project(
    name: str, volume: Array, scale: str, scan: Scan, lesions: Sequence[Lesion], plane: Plane, frame: Frame
) -> Picture:
    highest = volume.max(plane.axis)
    if scale:
        image = jpeg(coloured(frame.cut(highest, plane), scale), frame.extent(plane))
    else:
        image = frame.grey(highest, plane)
    outlines = [Outline(label, layer, frame.outline(voxels, plane)) for label, layer, voxels in layers(lesions)]
    alt = f"{name}, largest value along each {plane.name} line of sight, with {counted(len(lesions), 'lesion')}"
    return Picture(plane.name, alt, *frame.extent(plane), image, plane.letters, outlines)


def name_layers(lesions: Sequence[Lesion], words: Mapping[str, str]) -> list[tuple[str, str, int]]:
    """The layers of a page in the order of ``words``: key, words and number of lesions, where there are any."""
    counts = {key: sum(lesion.status == key for lesion in lesions) for key in words}
    return [(key, text, counts[key]) for key, text in words.items() if counts[key]]
