#!/usr/bin/env bash
# SimpleITK 2.5.7
#
# Expected: an image and the file that SimpleITK wrote of it lie at the same place, and can be added or compared.
# Happens:  NIfTI-1 keeps places in 32 bits, which is 3e-6 mm at an origin of 126.7 mm. Two images have to agree to a
#           millionth of the first one's voxel size: the smaller the voxels, the less rounding is allowed. At 0.47 mm
#           SimpleITK refuses to add an image to its own .nii.gz copy; at 8 mm it does not.
# Hit:      an image in NIfTI beside a mask in NRRD or MetaImage, or beside one in memory: high-resolution scans are
#           refused ("do not occupy the same physical space"), coarse ones of the same study pass.
#
# Output seen:
#   SimpleITK 2.5.7
#   voxels of 0.47 mm: origins 3.1e-06 mm apart, refused
#   voxels of 8 mm: origins 3.1e-06 mm apart, added
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 >&2
cd "$folder"
venv/bin/python - <<'PYTHON'
import SimpleITK as sitk

print(f"SimpleITK {sitk.Version_VersionString()}")
found = []
for size in (0.47, 8.0):
    image = sitk.Image(4, 4, 4, sitk.sitkUInt8)
    image.SetSpacing((size, size, size))
    image.SetOrigin((-126.7, 90.3, 72.1))
    sitk.WriteImage(image, "copy.nii.gz")
    copy = sitk.ReadImage("copy.nii.gz")
    apart = max(abs(one - other) for one, other in zip(image.GetOrigin(), copy.GetOrigin()))
    try:
        image + copy
        result = "added"
    except RuntimeError as error:
        result = "refused" if "physical space" in str(error) else "failed otherwise"
    print(f"voxels of {size:g} mm: origins {apart:.1e} mm apart, {result}")
    found.append(result)
raise SystemExit(0 if found == ["refused", "added"] else 1)
PYTHON
