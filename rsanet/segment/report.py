"""A picture of a prediction: FLAIR slices, the reference, hits, misses and false lesions, and the attention maps."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel
import numpy as np
from scipy import ndimage

from rsanet.segment import files
from rsanet.segment.html.pictures import grey_range
from rsanet.segment.metrics import PROTOCOLS, CaseMetrics, Protocol, evaluate_case
from rsanet.segment.volumes import MaskSource, read_image, read_mask, same_grid, tissue_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray

# Yellow, blue and orange of Okabe and Ito, and a magenta that stays apart from them for colour-blind readers too.
COLOURS = {
    "reference": "#F0E442",
    "hit": "#56B4E9",
    "missed": "#E69F00",
    "false": "#D40078",
    "warning": "#B34700",
    "text": "#1A1A1A",
    "quiet": "#666666",
}
MEANINGS = {
    "reference": "reference",
    "hit": "true positive",
    "missed": "false negative (missed)",
    "false": "false positive",
}
HEADINGS = {"flair": "FLAIR", "reference": "Reference", "prediction": "Prediction", "detail": "Detail"}
MAP_COLOURS = "magma"
SIMULATED = "simulated data: no clinical meaning"

PANEL = 2.6  # inches; width of an image panel
GAP = 0.06
NOTE_LINE = 0.14  # inches; a line of the note at the foot
LETTERS = 17  # of the note to the inch
MAP_GAP = 0.62  # inches; between two attention maps, for their words
DETAIL_MM = 50.0  # width of the enlarged detail


@dataclass(frozen=True)
class View:
    """One subject's volumes on one grid, axes right, anterior, superior.

    Attributes:
        name: shown beside the slices.
        flair: (X, Y, Z) image.
        reference: (X, Y, Z) bool, or None.
        prediction: (X, Y, Z) bool, or None.
        spacing: voxel size in mm.
        origin: world mm of voxel (0, 0, 0).
        metrics: how the two masks agree, if there are two.
    """

    name: str
    flair: Array
    reference: Array | None
    prediction: Array | None
    spacing: Array
    origin: Array
    metrics: CaseMetrics | None

    @classmethod
    def of(
        cls,
        flair: Any,
        reference: Any = None,
        prediction: Any = None,
        *,
        affine: Array | None = None,
        name: str = "",
        protocol: Protocol = PROTOCOLS["custom"],
    ) -> "View":
        """Bring a subject's volumes to the canonical orientation.

        Args:
            flair: a nibabel image, the path of one, or an array.
            reference: likewise, or None.
            prediction: likewise, or None.
            affine: voxel to world mm; needed with arrays only.
            name: shown beside the slices.
            protocol: how lesions are counted.
        """
        if isinstance(flair, (str, os.PathLike)):
            voxels, header = read_image(flair)
            flair = nibabel.Nifti1Image(voxels, header.affine)
        image = _image(flair, affine, "flair")
        canonical = nibabel.as_closest_canonical(image)
        masks: list[Array | None] = []
        for mask, what in ((reference, "reference"), (prediction, "prediction")):
            if mask is None:
                masks.append(None)
                continue
            source = what
            if isinstance(mask, (str, os.PathLike, MaskSource)):
                source = str(mask)
                voxels, header = read_mask(mask)
                mask = nibabel.Nifti1Image(voxels.astype(np.uint8), header.affine)
            mask = _image(mask, image.affine, what)
            if not same_grid(mask, image):
                raise ValueError(
                    f"{source} has shape {mask.shape} and flair {image.shape}, or their affines differ: "
                    "give masks on the image's grid."
                )
            masks.append(np.asarray(nibabel.as_closest_canonical(mask).dataobj))
        spacing = nibabel.affines.voxel_sizes(canonical.affine)
        numbers = None
        if masks[0] is not None and masks[1] is not None:
            numbers = evaluate_case(masks[1], masks[0], spacing, protocol, subject=name)
        seen = [None if mask is None else mask > 0 for mask in masks]
        volume = np.asarray(canonical.dataobj, dtype=np.float32)
        return cls(name, np.nan_to_num(volume), *seen, spacing, canonical.affine[:3, 3], numbers)

    @cached_property
    def tissue(self) -> Array:
        """(X, Y, Z) bool, where the image shows the head."""
        return tissue_mask(self.flair)

    @cached_property
    def greys(self) -> tuple[float, float]:
        """What is drawn black and what white."""
        return grey_range(self.flair[self.tissue], self.flair[~self.tissue])

    def lesions(self) -> Array:
        """Voxels of either mask."""
        seen = [mask for mask in (self.reference, self.prediction) if mask is not None]
        return np.logical_or.reduce(seen) if seen else np.zeros(self.flair.shape, bool)

    def slices(self, count: int) -> list[int]:
        """The axial slices with the most lesion, at least 10 mm apart, from superior to inferior."""
        area = self.lesions().sum((0, 1)).astype(float)
        if not area.any():
            area = self.tissue.sum((0, 1)).astype(float)
        apart = max(1, round(10 / float(self.spacing[2])))
        chosen: list[int] = []
        while len(chosen) < count and area.max() > 0:
            best = int(area.argmax())
            chosen.append(best)
            area[max(0, best - apart + 1) : best + apart] = 0
        return sorted(chosen or [self.flair.shape[2] // 2], reverse=True)

    def height(self, index: int) -> float:
        """World z of an axial slice in mm."""
        return float(self.origin[2] + index * self.spacing[2])


def _image(volume: Any, affine: Array | None, what: str) -> nibabel.Nifti1Image:
    if isinstance(volume, np.ndarray):
        if affine is None:
            raise ValueError(f"{what} is an array without an affine: give affine=, or a nibabel image.")
        volume = nibabel.Nifti1Image(volume.astype(np.float32), affine)
    if len(volume.shape) != 3:
        raise ValueError(f"{what} has shape {tuple(volume.shape)}: give a volume with three dimensions.")
    return volume


def draw_overlay(
    flair: Any,
    reference: Any,
    prediction: Any,
    attention_maps: Mapping[str, Array] | Sequence[tuple[str, Array]] | None,
    out: str | os.PathLike,
    *,
    affine: Array | None = None,
    name: str = "",
    protocol: Protocol = PROTOCOLS["custom"],
    slices: int = 2,
    simulated: bool = False,
    contrast: str = "FLAIR",
) -> Path:
    """Draw one subject: the slices with most lesion, and the attention maps of the RSA block beside them.

    Args:
        flair: a nibabel image, the path of one, or an array with ``affine``.
        reference: reference lesion mask, likewise, or None.
        prediction: predicted lesion mask, likewise, or None.
        attention_maps: (S, S) maps by axis name; row i of a map says where slice i looks. None draws none.
        out: picture to write: .png, .pdf or .svg.
        affine: voxel to world mm; needed with arrays only.
        name: name of the subject, for the title.
        protocol: how lesions are counted.
        slices: number of slices.
        simulated: whether to say that the data are simulated.
        contrast: what to call the image.

    Returns:
        The path written.
    """
    view = View.of(flair, reference, prediction, affine=affine, name=name, protocol=protocol)
    rows = [(view, index, f"z = {view.height(index):.0f} mm") for index in view.slices(slices)]
    title = " · ".join(part for part in (name, _agreement(view)) if part)
    return _draw(rows, title, attention_maps, out, protocol, simulated, contrast)


def draw_report(
    views: Sequence[View],
    attention_maps: Mapping[str, Array] | Sequence[tuple[str, Array]] | None,
    out: str | os.PathLike,
    *,
    title: str = "",
    protocol: Protocol = PROTOCOLS["custom"],
    simulated: bool = False,
) -> Path:
    """Draw several subjects, a row each: the axial slice with most lesion.

    Args:
        views: the subjects, from :meth:`View.of`.
        attention_maps: (S, S) maps by axis name, drawn once; None draws none.
        out: picture to write: .png, .pdf or .svg.
        title: first line of the picture.
        protocol: how lesions were counted.
        simulated: whether to say that the data are simulated.

    Returns:
        The path written.
    """
    if not views:
        raise ValueError("views is empty: give at least one subject.")
    rows = []
    for view in views:
        index = view.slices(1)[0]
        name = ", ".join(part for part in (view.name, f"z = {view.height(index):.0f} mm") if part)
        rows.append((view, index, "\n".join(part for part in (name, _agreement(view, short=True)) if part)))
    return _draw(rows, title, attention_maps, out, protocol, simulated)


def _agreement(view: View, *, short: bool = False) -> str:
    numbers = view.metrics
    if numbers is None:
        return ""
    found = f"{numbers.detected_lesions} of {numbers.reference_lesions} lesions found"
    text = f"Dice {numbers.dice:.2f} · {found} · {numbers.false_lesions} false"
    if short:
        return text
    return f"{text} · lesion load {numbers.reference_mm3 / 1000:.1f} mL"


# --- drawing ----------------------------------------------------------------------------------------------


def _draw(
    rows: Sequence[tuple[View, int, str]],
    title: str,
    attention_maps: Mapping[str, Array] | Sequence[tuple[str, Array]] | None,
    out: str | os.PathLike,
    protocol: Protocol,
    simulated: bool,
    contrast: str = HEADINGS["flair"],
) -> Path:
    from matplotlib.figure import Figure

    out = Path(out)
    if out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{out} is not a picture: end its name in .png, .pdf or .svg.")
    maps = _checked_maps(attention_maps)
    columns = ["flair"]
    columns += ["reference"] if any(view.reference is not None for view, _, _ in rows) else []
    columns += ["prediction"] if any(view.prediction is not None for view, _, _ in rows) else []
    columns += ["detail"] if len(columns) > 1 else []
    crops = [_crop(view, index) for view, index, _ in rows]
    # One scale for all rows: the largest head decides the size of a panel in mm.
    wide, high = (max(crop[axis][1] - crop[axis][0] for crop in crops) for axis in (0, 1))
    panel_height = PANEL * high / wide
    left = 0.27 + 0.16 * max(1 + label.count("\n") for _, _, label in rows)
    top, bottom = 0.98, 0.52
    body = len(rows) * (panel_height + GAP) - GAP
    side = min(2.0, (body + 0.3) / len(maps) - MAP_GAP) if maps else 0.0
    if maps and side < 1.2:
        side = 1.2
        body = len(maps) * (side + MAP_GAP) - 0.3
    width = left + len(columns) * (PANEL + GAP) + (side + 1.45 if maps else 0.1)
    note = "Radiological view: the patient's right (R) is on the left."
    if any(view.metrics is not None for view, _, _ in rows):
        note += " " + protocol.describe()
    lines = textwrap.wrap(note, int((width - left) * LETTERS))
    height = top + body + bottom + NOTE_LINE * len(lines)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")

    def place(x: float, y: float, w: float, h: float) -> "Axes":
        """Axes at inches from the left and from the top of the picture."""
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    for row, (view, index, label) in enumerate(rows):
        y = top + row * (panel_height + GAP)
        limits = _centred(crops[row], wide, high)
        detail = _detail(view, index, high / wide)
        for column, what in enumerate(columns):
            axes = place(left + column * (PANEL + GAP), y, PANEL, panel_height)
            _draw_slice(axes, view, index, what, detail if what == "detail" else limits)
            if what == "prediction" or columns[column + 1 :] == ["detail"]:
                _frame(axes, detail)
            if row == 0:
                axes.set_title(
                    contrast if what == "flair" else HEADINGS[what], fontsize=11, color=COLOURS["text"], pad=5
                )
        figure.text(
            (left - 0.12) / width,
            1 - (y + panel_height / 2) / height,
            label,
            rotation=90,
            ha="right",
            va="center",
            multialignment="center",
            fontsize=9,
            color=COLOURS["quiet"],
            linespacing=1.4,
        )
    x = left + len(columns) * (PANEL + GAP) + 0.55
    for number, (name, values) in enumerate(maps.items()):
        y = top + number * (side + MAP_GAP)
        _draw_map(place(x, y, side, side), place(x + side + 0.07, y, 0.09, side), name, values)
    _write_words(figure, title, columns, lines, simulated, left, width, height)
    with files.written_beside(out) as partial:
        figure.savefig(partial, facecolor="white")
    return out


def _write_words(
    figure: "Figure",
    title: str,
    columns: Sequence[str],
    note: Sequence[str],
    simulated: bool,
    left: float,
    width: float,
    height: float,
) -> None:
    from matplotlib.patches import Patch

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, va="baseline", **style)

    write(left, 0.36, title or "Lesion segmentation", fontsize=14, weight="bold", color=COLOURS["text"])
    if simulated:
        write(left, 0.60, SIMULATED, fontsize=10, style="italic", color=COLOURS["warning"])
    both = "reference" in columns and "prediction" in columns
    shown = ["reference"] if "reference" in columns else []
    if both:
        shown += ["hit", "missed", "false"]
    handles = [Patch(facecolor=COLOURS[key], edgecolor="none", label=MEANINGS[key]) for key in shown]
    if not both and "prediction" in columns:
        handles.append(Patch(facecolor=COLOURS["hit"], edgecolor="none", label="prediction"))
    if handles:
        figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(left / width, (0.16 + NOTE_LINE * len(note)) / height),
            borderaxespad=0,
            borderpad=0,
            ncols=4,
            frameon=False,
            fontsize=9.5,
            handlelength=1.1,
            handleheight=0.9,
            columnspacing=1.6,
            labelcolor=COLOURS["text"],
        )
    for number, line in enumerate(reversed(note)):
        write(left, height - NOTE_LINE * (number + 1), line, fontsize=8, color=COLOURS["quiet"])


def _checked_maps(
    attention_maps: Mapping[str, Array] | Sequence[tuple[str, Array]] | None,
) -> dict[str, Array]:
    maps = {name: np.asarray(values, dtype=np.float64) for name, values in dict(attention_maps or {}).items()}
    for name, values in maps.items():
        if values.ndim != 2 or values.shape[0] != values.shape[1]:
            raise ValueError(f"The {name} attention map has shape {values.shape}: give one (S, S) map per axis.")
    return maps


def _crop(view: View, index: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Extent of what is seen in a slice, in mm along x and y from the first voxel's edge, with a margin."""
    black, white = view.greys
    head = view.flair[:, :, index] > black + 0.1 * (white - black)
    spans = []
    for axis in (0, 1):
        inside = np.flatnonzero(head.any(axis=1 - axis))
        first, last = (inside[0], inside[-1] + 1) if inside.size else (0, head.shape[axis])
        size = float(view.spacing[axis])
        spans.append((first * size - 6.0, last * size + 6.0))
    return spans[0], spans[1]


def _detail(view: View, index: int, ratio: float) -> tuple[float, float, float, float]:
    """Limits of the detail: the part of a slice with most lesion."""
    size = view.spacing[:2]
    mask = view.lesions()[:, :, index]
    middle = np.array(mask.shape) / 2
    if mask.any():
        # A little smaller than the detail, which keeps the lesions away from its edge.
        window = np.maximum(1, np.round(0.8 * np.array([DETAIL_MM, DETAIL_MM * ratio]) / size)).astype(int)
        density = ndimage.uniform_filter(mask.astype(np.float32), window, mode="constant")
        corner = np.maximum(0, np.unravel_index(density.argmax(), mask.shape) - window // 2)
        inside = np.argwhere(mask[corner[0] : corner[0] + window[0], corner[1] : corner[1] + window[1]]) + corner
        middle = (inside.min(0) + inside.max(0) + 1) / 2
    x, y = middle * size
    return _centred(((x, x), (y, y)), DETAIL_MM, DETAIL_MM * ratio)


def _frame(axes: "Axes", limits: tuple[float, float, float, float]) -> None:
    """Show where the detail lies."""
    from matplotlib.patches import Rectangle

    x0, x1, y0, y1 = limits
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", linewidth=0.7, alpha=0.8))


def _centred(
    crop: tuple[tuple[float, float], tuple[float, float]], wide: float, high: float
) -> tuple[float, float, float, float]:
    """Limits (x from, x to, y from, y to) of a panel of the given size around a crop."""
    (x0, x1), (y0, y1) = crop
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return x - wide / 2, x + wide / 2, y - high / 2, y + high / 2


def _draw_slice(axes: "Axes", view: View, index: int, what: str, limits: tuple[float, float, float, float]) -> None:
    """One axial slice in mm, so that voxels have their true shape; the patient's right is on the left."""
    extent = (0, view.flair.shape[0] * view.spacing[0], 0, view.flair.shape[1] * view.spacing[1])
    black, white = view.greys
    axes.set_facecolor("black")
    axes.imshow(
        view.flair[:, :, index].T,
        origin="lower",
        extent=extent,
        cmap="gray",
        vmin=black,
        vmax=white,
        interpolation="bicubic",
    )
    nothing = np.zeros(view.flair.shape[:2], bool)
    reference = nothing if view.reference is None else view.reference[:, :, index]
    prediction = nothing if view.prediction is None else view.prediction[:, :, index]
    if what == "reference":
        _fill(axes, reference, "reference", extent, opacity=0.0)
    elif what != "flair" and view.reference is None:
        _fill(axes, prediction, "hit", extent)
    elif what != "flair" and view.prediction is None:
        _fill(axes, reference, "reference", extent, opacity=0.0)
    elif what != "flair":
        _fill(axes, prediction & reference, "hit", extent)
        _fill(axes, reference & ~prediction, "missed", extent)
        _fill(axes, prediction & ~reference, "false", extent)
    x0, x1, y0, y1 = limits
    axes.set(xlim=(x1, x0), ylim=(y0, y1), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if what == "detail":
        return
    letter = {"transform": axes.transAxes, "color": "white", "fontsize": 9, "va": "center", "alpha": 0.85}
    axes.text(0.025, 0.5, "R", ha="left", **letter)
    axes.text(0.975, 0.5, "L", ha="right", **letter)


def _fill(
    axes: "Axes",
    mask: Array,
    colour: str,
    extent: tuple[float, float, float, float],
    opacity: float = 0.5,
) -> None:
    """Colour the voxels of a mask and draw the outline along their edges."""
    from matplotlib.colors import to_rgba

    if not mask.any():
        return
    layer = np.zeros((*mask.T.shape, 4))
    layer[mask.T] = to_rgba(COLOURS[colour], opacity)
    axes.imshow(layer, origin="lower", extent=extent, interpolation="nearest")
    # Contours run between samples: with every voxel repeated they follow its edges instead of cutting its corners.
    finer = 6
    fine = np.kron(mask.T, np.ones((finer, finer)))
    xs, ys = (
        (np.arange(n * finer) + 0.5) / (n * finer) * end
        for n, end in zip(mask.shape, (extent[1], extent[3]), strict=True)
    )
    axes.contour(xs, ys, fine, levels=[0.5], colors=[COLOURS[colour]], linewidths=1.0)


def _draw_map(axes: "Axes", bar: "Axes", name: str, values: Array) -> None:
    """A heat map of where each slice looks, in multiples of looking everywhere alike."""
    size = values.shape[0]
    relative = values * size
    least, most = float(relative.min()), float(np.percentile(relative, 99.5))
    drawn = axes.imshow(
        relative,
        cmap=MAP_COLOURS,
        vmin=least,
        vmax=max(most, least + 1e-3),
        origin="lower",
        interpolation="nearest",
        aspect="auto",
    )
    quiet = COLOURS["quiet"]
    axes.set_title(f"{name.capitalize()} attention", fontsize=10, color=COLOURS["text"], pad=4)
    axes.set_xlabel("slice (to)", fontsize=8, color=quiet, labelpad=1)
    axes.set_ylabel("slice (from)", fontsize=8, color=quiet, labelpad=1)
    ticks = sorted({0, (size - 1) // 2, size - 1})
    axes.set(xticks=ticks, yticks=ticks)
    axes.tick_params(labelsize=7, length=2, color=quiet, labelcolor=quiet)
    axes.figure.colorbar(drawn, cax=bar)
    bar.tick_params(labelsize=7, length=2, color=quiet, labelcolor=quiet)
    bar.set_ylabel("× uniform", fontsize=7.5, color=quiet, labelpad=2)
    bar.locator_params(nbins=4)
    for part in (axes, bar):
        for spine in part.spines.values():
            spine.set_visible(False)
