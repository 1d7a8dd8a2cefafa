#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): a DICOM series whose positions drift within the plane is read as a straight stack.
#
# Such series come from a tilted gantry: ImagePositionPatient moves sideways from slice to slice. An image of ITK could
# hold the shear (its direction may be any matrix that is not singular), but ImageSeriesReader takes the normal of the
# slices as the third direction and the length of the step, sideways part included, as the spacing. Voxels lie up to
# 10.0 mm from where their tags put them here, without an error or a warning.
#
# Output seen:
# SimpleITK 2.5.7 with ITK 5.4
# steps of (0, 0.9, 3) mm: spacing (1.25, 1.5, 3.132), third direction (0.0, 0.0, 1.0)
# the last slice is at (0.0, 0.0, 34.453), by its tags at (0, 9.9, 33)
# as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 numpy==2.2.6 pydicom==3.0.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

print("SimpleITK", sitk.Version.VersionString(), "with ITK", sitk.Version.ITKVersionString())


def dataset(pixels, **tags):
    found = Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.SOPClassUID = found.file_meta.MediaStorageSOPClassUID = MRImageStorage
    found.SOPInstanceUID = found.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    found.Modality, found.StudyInstanceUID, found.SeriesInstanceUID = "MR", "1.2.3", "1.2.3.4"
    found.Rows, found.Columns = pixels.shape[-2:]
    found.BitsAllocated, found.BitsStored, found.HighBit, found.PixelRepresentation = 16, 16, 15, 0
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(found, name, value)
    return found


def place(number, position=(0, 0, 0)):
    return {"InstanceNumber": number + 1, "ImagePositionPatient": list(position), "SliceThickness": "3"} | {
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1.5, 1.25]
    }


files = [f"{number:02}.dcm" for number in range(12)]
for number, name in enumerate(files):
    position = (0, round(0.9 * number, 1), 3 * number)
    dataset(np.ones((4, 6)), **place(number, position)).save_as(name, enforce_file_format=True)
reader = sitk.ImageSeriesReader()
reader.SetFileNames(files)
image = reader.Execute()
spacing = tuple(round(each, 3) for each in image.GetSpacing())
third = image.GetDirection()[2::3]
last = tuple(round(each, 3) for each in image.TransformIndexToPhysicalPoint((0, 0, 11)))
print(f"steps of (0, 0.9, 3) mm: spacing {spacing}, third direction {third}")
print(f"the last slice is at {last}, by its tags at (0, 9.9, 33)")
same = spacing == (1.25, 1.5, 3.132) and third == (0, 0, 1) and last == (0, 0, 34.453)
print("as stated" if same else "CHANGED")
sys.exit(not same)
PYTHON
