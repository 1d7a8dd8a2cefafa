#!/usr/bin/env bash
# nibabel 5.4.2
#
# Expected: as_closest_canonical changes the order of the voxels alone, and the header says afterwards what it said
#           before: an sform of MNI space (code 4), a qform of the scanner (code 1).
# Happens:  where axes are turned, the sform's code becomes 2 ("aligned", with what is not said), the qform becomes a copy
#           of the sform with code 0, and the place in the scanner is lost. An image that runs to the right, the front and
#           up already comes back untouched, with both. So which spaces a file knows depends on how it was stored.
# Hit:      pipelines that bring images to RAS first and go back to scanner space or select by the code later; a cohort
#           of mixed orientations, in which some keep MNI and scanner space and others do not.
#
# Output seen:
#   nibabel 5.4.2
#   LAS: sform code 4 to 2, qform code 1 to 0, scanner origin [9, 8, 7] to [-2, 0, 0]
#   RAS: sform code 4 to 4, qform code 1 to 1, scanner origin [9, 8, 7] to [9, 8, 7]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check nibabel==5.4.2 >&2
cd "$folder"
venv/bin/python - <<'PYTHON'
import nibabel as nib
import numpy as np

print(f"nibabel {nib.__version__}")
found = []
for name, first in (("LAS", -1), ("RAS", 1)):
    template = np.diag([first, 1.0, 1, 1])
    scanner = template.copy()
    scanner[:3, 3] = 9, 8, 7
    image = nib.Nifti1Image(np.ones((3, 4, 5), np.uint8), template)
    image.set_sform(template, 4)
    image.set_qform(scanner, 1)
    turned = nib.as_closest_canonical(image)
    codes = [int(turned.header[key]) for key in ("sform_code", "qform_code")]
    origin = turned.header.get_qform()[:3, 3].astype(int).tolist()
    print(f"{name}: sform code 4 to {codes[0]}, qform code 1 to {codes[1]}, scanner origin [9, 8, 7] to {origin}")
    found.append((codes, origin))
raise SystemExit(0 if found == [([2, 0], [-2, 0, 0]), ([4, 1], [9, 8, 7])] else 1)
PYTHON
