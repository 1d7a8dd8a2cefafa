#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): an axis of an NRRD file whose spacing is unknown is read as 1 mm.
#
# NRRD has words for a length that is not known: NaN in `spacings`, `none` in `space directions` (as of a single slice).
# ReadImage reads both as a spacing of 1, without a warning, and a `thicknesses` field that gives the thickness is not used.
#
# Output seen:
# SimpleITK 2.5.7 with ITK 5.4
# spacings: 2 3 nan, thicknesses: nan nan 5: spacing (2.0, 3.0, 1.0)
# space directions: (2,0,0) (0,3,0) none: spacing (2.0, 3.0, 1.0)
# as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from pathlib import Path

import SimpleITK as sitk

print("SimpleITK", sitk.Version.VersionString(), "with ITK", sitk.Version.ITKVersionString())


def read(lines):
    header = "NRRD0005\ntype: uint8\ndimension: 3\nsizes: 4 6 1\nencoding: raw\n" + lines + "\n\n"
    Path("x.nrrd").write_bytes(header.encode() + bytes(24))
    return sitk.ReadImage("x.nrrd").GetSpacing()


one = read("spacings: 2 3 nan\nthicknesses: nan nan 5")
other = read("space: left-posterior-superior\nspace directions: (2,0,0) (0,3,0) none")
print(f"spacings: 2 3 nan, thicknesses: nan nan 5: spacing {one}")
print(f"space directions: (2,0,0) (0,3,0) none: spacing {other}")
same = one == other == (2, 3, 1)
print("as stated" if same else "CHANGED")
sys.exit(not same)
PYTHON
