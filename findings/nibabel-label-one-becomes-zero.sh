#!/usr/bin/env bash
# nibabel 5.4.2
#
# Expected: labels 0, 1 and 2 in a float array, saved as uint8 or int16, are 0, 1 and 2 when they are read again; all of
#           them fit.
# Happens:  an integer type for the file makes nibabel spread the values over the whole range of the type, with a slope
#           in float32. What comes back is 0, 0.996 and 2.0000001 of a uint8 file, and 0, 1.00002 and 1.9999999995 of an
#           int16 file. A cast to integers cuts these off: label 1 is gone from the one, label 2 is 1 in the other.
#           An integer array is stored as it is.
# Hit:      label maps and lesion masks that went through anything that returns floats (resampling, get_fdata) and were
#           saved under the header of an integer file. `== 1` finds nothing, and astype(int) moves labels.
#
# Output seen:
#   nibabel 5.4.2
#   uint8: [0.0, 0.9960784902796149, 2.000000118277967] as integers [0, 0, 2]
#   int16: [0.0, 1.0000152587890625, 1.9999999995343387] as integers [0, 1, 1]
#   uint8 of an integer array: [0.0, 1.0, 2.0] as integers [0, 1, 2]
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
labels = np.array([0, 1, 2]).reshape(3, 1, 1)


def read_back(array, kind):
    image = nib.Nifti1Image(array, np.eye(4))
    image.set_data_dtype(kind)
    nib.save(image, "labels.nii")
    values = nib.load("labels.nii").get_fdata().ravel()
    return values.tolist(), values.astype(int).tolist()


small, large = read_back(labels.astype(np.float32), np.uint8), read_back(labels.astype(np.float64), np.int16)
kept = read_back(labels.astype(np.int32), np.uint8)
print(f"uint8: {small[0]} as integers {small[1]}")
print(f"int16: {large[0]} as integers {large[1]}")
print(f"uint8 of an integer array: {kept[0]} as integers {kept[1]}")
raise SystemExit(0 if (small[1], large[1], kept[1]) == ([0, 0, 2], [0, 1, 1], [0, 1, 2]) else 1)
PYTHON
