#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): the slope and offset of intensities in a MetaImage header are ignored.
#
# MetaIO has ElementToIntensityFunctionSlope and ElementToIntensityFunctionOffset for the function from stored elements to
# intensities, and readers of VTK and MIRTK take them as such. ReadImage gives the stored elements, without a warning.
#
# Output seen:
# SimpleITK 2.5.7 with ITK 5.4
# stored 10 with slope 2 and offset 5: read 10
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
lines = [
    "ObjectType = Image", "NDims = 3", "DimSize = 2 2 2", "ElementSpacing = 1 1 1",
    "ElementToIntensityFunctionSlope = 2", "ElementToIntensityFunctionOffset = 5",
    "ElementType = MET_UCHAR", "ElementDataFile = LOCAL", "",
]
Path("x.mha").write_bytes("\n".join(lines).encode() + bytes([10] * 8))
found = sitk.ReadImage("x.mha")[0, 0, 0]
print(f"stored 10 with slope 2 and offset 5: read {found}")
print("as stated" if found == 10 else "CHANGED")
sys.exit(found != 10)
PYTHON
