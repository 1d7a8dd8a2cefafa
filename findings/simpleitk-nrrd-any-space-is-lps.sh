#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): an NRRD in a space that names no side of the patient is read as left-posterior-superior.
#
# NRRD has spaces of the patient (left-posterior-superior, right-anterior-superior, left-anterior-superior) and others of
# which it says no more than how their axes turn: 3D-right-handed, 3D-left-handed, and scanner-xyz, that of the scanner.
# ReadImage turns the first ones to LPS, and takes the numbers of all others as they stand, a left-handed space among
# them, without an error or a warning. Left and right of such an image are a guess. Only the metadata NRRD_space tells.
#
# Output seen:
# SimpleITK 2.5.7 with ITK 5.4
# left-posterior-superior: origin (10.0, 20.0, 30.0)
# right-anterior-superior: origin (-10.0, -20.0, 30.0)
# scanner-xyz: origin (10.0, 20.0, 30.0)
# 3D-right-handed: origin (10.0, 20.0, 30.0)
# 3D-left-handed: origin (10.0, 20.0, 30.0)
# metadata NRRD_space names the last three: True; words on stderr: none
# as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7
cd "$folder"
cat > read.py <<'PYTHON'
import sys

import SimpleITK as sitk

SPACES = ["left-posterior-superior", "right-anterior-superior", "scanner-xyz", "3D-right-handed", "3D-left-handed"]
LPS, TURNED = (10.0, 20.0, 30.0), (-10.0, -20.0, 30.0)
print("SimpleITK", sitk.Version.VersionString(), "with ITK", sitk.Version.ITKVersionString())
same, named = True, []
for space in SPACES:
    lines = [
        "NRRD0005",
        "type: uint8",
        "dimension: 3",
        f"space: {space}",
        "sizes: 2 3 4",
        "space directions: (1,0,0) (0,1,0) (0,0,1)",
        "space origin: (10,20,30)",
        "encoding: raw",
    ]
    with open("image.nrrd", "wb") as file:
        file.write(("\n".join(lines) + "\n\n").encode() + bytes(range(24)))
    image = sitk.ReadImage("image.nrrd")
    print(f"{space}: origin {image.GetOrigin()}")
    same &= image.GetOrigin() == (TURNED if space.startswith("right-") else LPS)
    named.append(image.HasMetaDataKey("NRRD_space") and image.GetMetaData("NRRD_space") == space)
print(f"metadata NRRD_space names the last three: {all(named[2:])}; words on stderr: ", end="", flush=True)
sys.exit(not (same and all(named[2:])))
PYTHON
rc=0
"$folder/venv/bin/python" read.py 2> stderr || rc=1
[ -s stderr ] && { cat stderr; rc=1; } || echo none
[ $rc = 0 ] && echo "as stated" || echo CHANGED
exit $rc
