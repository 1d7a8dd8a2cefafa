#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): the space units of an NRRD file are ignored.
#
# `space units: "cm" "cm" "cm"` says that directions and origin are in centimetres. ReadImage takes the numbers as they are,
# without a warning and without the units in the metadata dictionary, so that a volume is a thousandth of what it is.
#
# Output seen:
# SimpleITK 2.5.7 with ITK 5.4
# directions of 0.2, 0.3, 0.4 cm: spacing (0.2, 0.3, 0.4), units in the metadata: False
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
    "NRRD0005", "type: uint8", "dimension: 3", "sizes: 2 3 4", "encoding: raw", "space: left-posterior-superior",
    "space directions: (0.2,0,0) (0,0.3,0) (0,0,0.4)", "space origin: (1,2,3)", 'space units: "cm" "cm" "cm"',
]
Path("x.nrrd").write_bytes("\n".join([*lines, "", ""]).encode() + bytes(24))
image = sitk.ReadImage("x.nrrd")
told = any("unit" in key.lower() or "cm" in image.GetMetaData(key) for key in image.GetMetaDataKeys())
print(f"directions of 0.2, 0.3, 0.4 cm: spacing {image.GetSpacing()}, units in the metadata: {told}")
same = image.GetSpacing() == (0.2, 0.3, 0.4) and not told
print("as stated" if same else "CHANGED")
sys.exit(not same)
PYTHON
