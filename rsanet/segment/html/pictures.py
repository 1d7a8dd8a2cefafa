"""Pictures for a page: grey slices and projections as data URIs in mm, and outlines as SVG paths over them."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rsanet.segment.volumes import tissue_mask

Array = np.ndarray

PIXEL = 0.6  # mm; finer than a voxel, so that the browser need not smooth a coarse picture
QUALITY = 82  # of JPEG
MARGIN = 4.0  # mm around the head
BRIGHTEST = 99.9  # percentile of the tissue that is drawn white


@dataclass(frozen=True)
class Plane:
    """A direction to look in. Every picture has its second and third axis to the left and to the top.

    Attributes:
        name: axial, coronal or sagittal.
        axis: across the slices.
        across: axis that runs from right to left of the picture.
        up: axis that runs from the bottom of the picture to its top.
        letters: what is at the left, right, top and bottom.
    """

    name: str
    axis: int
    across: int
    up: int
    letters: tuple[str, str, str, str]

    @property
    def world(self) -> str:
        """Name of the world's axis across the slices."""
        return "xyz"[self.axis]


# Radiological: the patient's right is on the left, and the face of a sagittal slice looks to the left.
PLANES = (
    Plane("axial", 2, 0, 1, ("R", "L", "A", "P")),
    Plane("coronal", 1, 0, 2, ("R", "L", "S", "I")),
    Plane("sagittal", 0, 1, 2, ("A", "P", "S", "I")),
)


@dataclass(frozen=True)
class Outline:
    """The outline of a lesion in a picture.

    Attributes:
        lesion: id of the lesion.
        layer: the layer it is switched with: a status, or a fate.
        path: of SVG, in mm of the picture.
    """

    lesion: str
    layer: str
    path: str


@dataclass(frozen=True)
class Picture:
    """A slice or a projection, in mm.

    Attributes:
        title: shown below it.
        alt: what a reader who cannot see it is told.
        width: mm.
        height: mm.
        image: data URI.
        letters: what is at the left, right, top and bottom.
        outlines: of lesions.
    """

    title: str
    alt: str
    width: float
    height: float
    image: str
    letters: tuple[str, str, str, str]
    outlines: list[Outline] = field(default_factory=list)


@dataclass(frozen=True)
class Frame:
    """The part of a scan that is drawn, and how bright.

    Attributes:
        box: (3, 2) first voxel and the one after the last, along each axis.
        spacing: (3,) voxel size in mm.
        white: value that is drawn white.
        black: value that is drawn black.
    """

    box: Array
    spacing: Array
    white: float
    black: float = 0.0

    @classmethod
    def around(cls, image: Array, spacing: Array, lesions: Iterable[Array] = ()) -> "Frame":
        """The head and every lesion, with a margin.

        Args:
            image: (X, Y, Z).
            spacing: voxel size in mm.
            lesions: voxels (N, 3) of each.
        """
        tissue = tissue_mask(image)
        box = []
        for axis in range(3):
            # A few noisy voxels of air do not widen the head.
            others = tuple({0, 1, 2} - {axis})
            share = tissue.mean(axis=others)
            used = np.flatnonzero(share > 0.02 * share.max())
            inside = [used[0], used[-1]] if used.size else [0, image.shape[axis] - 1]
            for voxels in lesions:
                inside += [voxels[:, axis].min(), voxels[:, axis].max()]
            margin = round(MARGIN / float(spacing[axis]))
            box.append((max(0, min(inside) - margin), min(image.shape[axis], max(inside) + 1 + margin)))
        # Beneath the scalp, whose fat is brighter than any brain.
        inner = tuple(slice(low + (high - low) // 6, high - (high - low) // 6) for low, high in box)
        values = image[inner][tissue[inner]]
        black, white = grey_range(values, image[~tissue])
        return cls(np.array(box), np.asarray(spacing, float), white, black)

    def extent(self, plane: Plane) -> tuple[float, float]:
        """Width and height of a picture in mm."""
        lengths = (self.box[:, 1] - self.box[:, 0]) * self.spacing
        return float(lengths[plane.across]), float(lengths[plane.up])

    def cut(self, flat: Array, plane: Plane) -> Array:
        """The part of a slice (across, up) that is drawn, as rows from top to bottom of the picture."""
        (u0, u1), (v0, v1) = self.box[plane.across], self.box[plane.up]
        return flat[u0:u1, v0:v1].T[::-1, ::-1]

    def grey(self, flat: Array, plane: Plane) -> str:
        """Data URI of a slice (across, up) of the image."""
        shown = np.clip((self.cut(flat, plane) - self.black) / (self.white - self.black), 0, 1)
        return jpeg((255 * shown).astype(np.uint8), self.extent(plane))

    def outline(self, voxels: Array, plane: Plane) -> str:
        """SVG path along the edges of voxels (N, 3) seen in a plane, whatever their place across it."""
        u, v = voxels[:, plane.across], voxels[:, plane.up]
        right, top = self.box[plane.across][1], self.box[plane.up][1]
        step_u, step_v = self.spacing[plane.across], self.spacing[plane.up]
        parts = []
        for line in edges(u, v):
            points = np.round((np.array([right, top]) - line) * (step_u, step_v), 2)
            parts.append("M" + "L".join(f"{x:g},{y:g}" for x, y in points[:-1]) + "Z")
        return "".join(parts)


def grey_range(tissue: Array, background: Array) -> tuple[float, float]:
    """What is drawn black and what white, of the values of tissue and background: every scale and offset is shown."""
    if not tissue.size:
        return 0.0, 1.0
    darkest, white = np.percentile(tissue, (1, BRIGHTEST))
    black = min(np.median(background), darkest) if background.size else darkest
    return float(black), float(white if white > black else black + 1)


def edges(u: Array, v: Array) -> list[Array]:
    """Closed lines (K, 2) around pixels, their corners cut by a quarter; pixel i reaches from i to i + 1."""
    from contourpy import contour_generator

    u0, v0 = u.min(), v.min()
    mask = np.zeros((u.max() - u0 + 3, v.max() - v0 + 3))
    mask[u - u0 + 1, v - v0 + 1] = 1
    # Contours run between samples: with every pixel doubled they follow its edges instead of cutting through it.
    lines = contour_generator(z=np.kron(mask, np.ones((2, 2)))).lines(0.5)
    placed = []
    for line in lines:
        points = (line[:, ::-1] + 0.5) / 2 - 1 + (u0, v0)
        along = np.diff(np.concatenate((points[-2:-1], points)), axis=0)
        turns = np.abs(along[:-1, 0] * along[1:, 1] - along[:-1, 1] * along[1:, 0]) > 1e-9
        kept = points[:-1][turns]
        placed.append(np.concatenate((kept, kept[:1])))
    return placed


def jpeg(pixels: Array, extent: Sequence[float]) -> str:
    """Data URI of grey (H, W) or coloured (H, W, 3) uint8 pixels that cover an extent in mm."""
    from PIL import Image

    size = tuple(max(1, round(length / PIXEL)) for length in extent)
    picture = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, optimize=True)
    return _uri("jpeg", file)


def png(pixels: Array) -> str:
    """Data URI of coloured (H, W, 3) uint8 pixels, exactly as they are."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
    return _uri("png", file)


def coloured(values: Array, name: str) -> Array:
    """Values from 0 to 1 (...) as colours (..., 3) uint8 of one of matplotlib's scales."""
    from matplotlib import colormaps

    return (255 * colormaps[name](np.clip(values, 0, 1))[..., :3]).astype(np.uint8)


def _uri(kind: str, file: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
