"""The anatomy under the lesions: the ICBM 152 template that nilearn ships, and where lesions may arise in it."""

from dataclasses import dataclass
from functools import lru_cache

import nibabel
import numpy as np
import torch
from scipy import ndimage

from rsanet.extras import install

Array = np.ndarray

MARGIN = 4  # voxels of background around the template's brain


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The template: maps on its own grid, in template millimetres.

    Attributes:
        maps: (6, X, Y, Z) float32: T1, grey, white, CSF, brain, signed distance to the lateral ventricles.
        origin: world mm of voxel (0, 0, 0); voxels are 1 mm, axes point right, anterior, superior.
        cortex_distance: (X, Y, Z) mm to the cortex.
        candidates: for each kind of lesion, the flat indices of the voxels where one may be centred.
        detail_means: mean T1 of CSF, grey and white matter.
    """

    maps: torch.Tensor
    origin: Array
    cortex_distance: Array
    candidates: dict[str, Array]
    detail_means: tuple[float, float, float] = (0.28, 0.655, 0.87)

    def distance(self, kind: str) -> Array:
        """The distance whose gradient is the axis of this kind of lesion."""
        return self.cortex_distance if kind == "juxtacortical" else self.maps[5].numpy()


@lru_cache(maxsize=1)
def averaged_maps(anatomy: Anatomy, spacing: tuple[float, float, float]) -> torch.Tensor:
    """The maps as voxels of a size in mm average them: (6, X, Y, Z). Widths of 1 mm and less need no filter."""
    maps = anatomy.maps.numpy()
    for axis, size in enumerate(spacing, start=1):
        width = max(1, round(size))
        maps = ndimage.uniform_filter1d(maps, width, axis=axis) if width > 1 else maps
    return torch.from_numpy(maps)


@lru_cache(maxsize=1)
def load_anatomy() -> Anatomy:
    """Load the template from nilearn and derive the distances and the places where lesions arise.

    Raises:
        RuntimeError: nilearn is not installed.
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise RuntimeError(
            f"The simulator needs the anatomy that nilearn ships, and nilearn is not installed: {install('demo')}."
        ) from error
    loaders = (
        datasets.load_mni152_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
    )
    templates = [nibabel.as_closest_canonical(load(resolution=1)) for load in loaders]
    t1, grey, white = (np.asarray(template.dataobj, dtype=np.float32) for template in templates)
    brain = t1 > 0
    # The brain touches the template's lowest slice: around its box comes a margin, so that the warp's border samples
    # are background on every side.
    box = ndimage.find_objects(brain.astype(np.uint8))[0]
    origin = templates[0].affine[:3, 3] + [span.start - MARGIN for span in box]
    t1, grey, white = (np.pad((volume * brain)[box], MARGIN) for volume in (t1, grey, white))
    brain = t1 > 0
    csf = np.clip(1 - grey - white, 0, 1) * brain
    x, y, z = (
        np.arange(n, dtype=np.float32).reshape(shape) + o
        for n, o, shape in zip(t1.shape, origin, [(-1, 1, 1), (1, -1, 1), (1, 1, -1)], strict=True)
    )
    ventricles = _lateral_ventricles(csf, origin, x, y, z)
    to_ventricles = _distance(ventricles) - _distance(~ventricles)
    # Deep grey nuclei are not cortex: cortex lies within a few millimetres of the outer CSF.
    outer = ~brain | ((csf > 0.3) & (to_ventricles > 12))
    cortex = (grey > 0.5) & (_distance(outer) < 5)
    to_cortex = _distance(cortex)
    maps = np.stack([t1, grey, white, csf, brain.astype(np.float32), to_ventricles]).astype(np.float32)

    below_tentorium = (z < 2 - 0.3 * np.abs(x)) & ((y < -28) | (np.abs(x) < 20))
    tissue = (white > 0.75) & ~below_tentorium
    # Grey nuclei and crossing fibres are mixed in the brainstem, where no voxel of the template is all white matter.
    brainstem = (white > 0.4) & (np.abs(x) < 16) & (y > -46) & (y < -12) & (z > -60) & (z < -12)
    # Lower than the occipital and temporal lobes reach behind it.
    cerebellum = (white > 0.7) & (np.abs(x) < 40) & (y < -42) & (z < -27)
    peduncles = (white > 0.7) & (np.abs(x) < 25) & (y > -46) & (y < -30) & (z > -42) & (z < -25)
    places = {
        # The corpus callosum's midline is left out by |x|: a lesion there would sit on the template's seam.
        "periventricular": tissue & (to_ventricles > 0.5) & (to_ventricles < 3) & (np.abs(x) > 5) & (to_cortex > 4),
        "juxtacortical": tissue & (to_cortex > 0.5) & (to_cortex < 3) & (to_ventricles > 10),
        "deep": tissue & (to_cortex > 4) & (to_ventricles > 8) & (z > 5),
        "infratentorial": brainstem | cerebellum | peduncles,
    }
    candidates = {name: np.flatnonzero(place) for name, place in places.items()}
    return Anatomy(torch.from_numpy(maps), origin, to_cortex, candidates)


def _distance(mask: Array) -> Array:
    """Distance in voxels (1 mm) to the nearest voxel of the mask."""
    return ndimage.distance_transform_edt(~mask).astype(np.float32)


def _lateral_ventricles(csf: Array, origin: Array, x: Array, y: Array, z: Array) -> Array:
    """The CSF connected to the frontal horns and the atria, within the box of the lateral ventricles."""
    box = (np.abs(x) < 42) & (y > -62) & (y < 38) & (z > -24) & (z < 34)
    labels, _ = ndimage.label((csf > 0.5) & box)
    inside = [(8, 18, 10), (-8, 18, 10), (27, -44, 6), (-27, -44, 6)]
    found = {int(labels[tuple(np.round(point - origin).astype(int))]) for point in inside} - {0}
    return np.isin(labels, list(found))
