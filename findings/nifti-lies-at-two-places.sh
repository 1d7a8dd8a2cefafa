#!/usr/bin/env bash
# nibabel 5.4.2 and SimpleITK 2.5.7
#
# Expected: two readers put the voxels of one valid NIfTI file at the same place.
# Happens:  a file may say by its qform where the voxels are in the scanner (code 1), and by its sform where they are in
#           a template (code 4, MNI) or another image (code 2). nibabel takes the sform. SimpleITK takes the qform, unless
#           the code of the sform is 1. Neither says a word. Here they are 12.4 mm apart.
# Hit:      whoever makes or draws a mask with one of them and reads it with the other, where an image was registered by
#           its header alone; overlaps and coordinates in the template are then those of another place.
#
# Output seen:
#   nibabel 5.4.2, SimpleITK 2.5.7
#   sform code 4, qform code 1: 12.4 mm apart
#   sform code 2, qform code 1: 12.4 mm apart
#   sform code 1, qform code 2: 0.0 mm apart
#   sform code 1, qform code 1: 0.0 mm apart
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check nibabel==5.4.2 SimpleITK==2.5.7 >&2
cd "$folder"
venv/bin/python - <<'PYTHON'
import nibabel as nib
import numpy as np
import SimpleITK as sitk

print(f"nibabel {nib.__version__}, SimpleITK {sitk.Version_VersionString()}")
scanner = np.diag([1.0, 1, 3, 1])
scanner[:3, 3] = -10, 20, -30
template = scanner.copy()
template[:3, 3] += 5, -7, 9
found = {}
for codes in ((4, 1), (2, 1), (1, 2), (1, 1)):
    image = nib.Nifti1Image(np.ones((20, 30, 10), np.int16), template)
    image.set_sform(template, codes[0])
    image.set_qform(scanner, codes[1])
    nib.save(image, "image.nii")
    one = nib.load("image.nii").affine[:3, 3]
    other = np.array(sitk.ReadImage("image.nii").GetOrigin()) * [-1, -1, 1]  # from LPS to RAS
    found[codes] = float(np.linalg.norm(one - other))
    print(f"sform code {codes[0]}, qform code {codes[1]}: {found[codes]:.1f} mm apart")
apart = float(np.linalg.norm([5, -7, 9]))
same = np.allclose([found[4, 1], found[2, 1], found[1, 2], found[1, 1]], [apart, apart, 0, 0], atol=1e-3)
raise SystemExit(0 if same else 1)
PYTHON
