"""Heads as large as an adult's, of plain shapes, with or without a skull: images whose faults are known."""

import nibabel as nib
import numpy as np
from nibabel.affines import from_matvec

LAYERS = (0.22, 0.8, 0.93, 1.0)  # ventricle, white matter, grey matter, fluid: of the way to the brain's surface
VALUES = {
    "FLAIR": (0.2, 0.8, 1.0, 0.25),
    "T1w": (0.3, 1.0, 0.7, 0.3),
    "T2w": (2.0, 0.8, 1.1, 2.0),
}
SKULL, SCALP = 7.0, 14.0  # mm from the brain's surface to where bone and scalp end
RADII = np.array([66.0, 82.0, 60.0])


def grid(spacing=4.0, affine=None, shape=None):
    """Shape and affine of a field of view around the head."""
    if affine is not None:
        return shape, np.asarray(affine, float)
    shape = tuple(np.ceil(2 * (RADII + 26) / spacing).astype(int))
    return shape, from_matvec(np.eye(3) * spacing, -spacing * (np.array(shape) - 1) / 2)


def head(contrast, seed=0, *, skull=False, noise=0.02, moved=None, lesions=True, scale=1.0, **field):
    """An image of nibabel, and where its lesions are.

    Args:
        contrast: one of VALUES.
        seed: of the anatomy and of the noise.
        skull: whether there are bone and scalp.
        noise: its deviation, of the white matter.
        moved: 4×4, where the whole head is moved to.
        lesions: whether there are some, bright on FLAIR and T2w.
        scale: of the head.
        field: see `grid`.
    """
    shape, affine = grid(**field)
    place = np.linalg.inv(np.eye(4) if moved is None else moved) @ affine
    points = np.moveaxis(np.indices(shape), 0, -1) @ place[:3, :3].T + place[:3, 3]
    shape_of = np.random.default_rng(seed)
    radii = RADII * scale * shape_of.uniform(0.97, 1.03, 3)
    folds = 1 + 0.03 * np.sin(points / 9 + shape_of.uniform(0, 6, 3)).sum(-1) / 3 + 0.06 * points[..., 1] / radii[1]
    way = np.linalg.norm(points / radii, axis=-1) * folds
    values = np.zeros(shape)
    for value, outer in reversed(list(zip(VALUES[contrast], LAYERS, strict=True))):
        values[way < outer] = value
    spots = np.zeros(shape, bool)
    for _ in range(6):
        centre = shape_of.uniform(-0.45, 0.45, 3) * radii
        spots |= np.linalg.norm(points - centre, axis=-1) < shape_of.uniform(6, 9)
    spots &= (way > LAYERS[0]) & (way < LAYERS[1])
    if lesions:
        values[spots] = {"FLAIR": 1.6, "T1w": 0.75, "T2w": 1.6}[contrast]
    if skull:
        beyond = (way - 1) * radii.mean()
        values[(beyond >= 0) & (beyond < SKULL)] = 0.06
        values[(beyond >= SKULL) & (beyond < SCALP)] = {"FLAIR": 0.7, "T1w": 1.3, "T2w": 1.0}[contrast]
    rng = np.random.default_rng([seed, sum(map(ord, contrast))])
    shown = values > 0
    values = np.abs(values + noise * rng.standard_normal(shape))
    if not skull:
        values *= shown
    return nib.Nifti1Image((1000 * values).astype(np.float32), affine), spots


def heads(contrasts=("FLAIR", "T1w", "T2w"), seed=0, **options):
    """The images of a subject by contrast."""
    return {name: head(name, seed, **options)[0] for name in contrasts}
