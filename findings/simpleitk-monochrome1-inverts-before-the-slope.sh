#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): stored values of a DICOM file with MONOCHROME1 are inverted before its slope is applied.
#
# PhotometricInterpretation says how values are shown (PS3.3 C.7.6.3.1.2: the smallest as white, after the VOI
# transformation). The output of the modality transformation, RescaleSlope times the stored value plus RescaleIntercept, has
# a meaning of its own (Hounsfield units in a CT). ReadImage turns stored values v into 2^BitsStored - 1 - v first, so that
# it is not these values that come out; nothing says so. The same file with MONOCHROME2 is read as it is stored.
#
# Output seen:
# SimpleITK 2.5.7 with ITK 5.4
# stored 100 of 12 bits, slope 2, intercept 1: MONOCHROME2 201, MONOCHROME1 7991
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


found = []
for kind in ("MONOCHROME2", "MONOCHROME1"):
    tags = {"BitsStored": 12, "HighBit": 11, "RescaleSlope": 2, "RescaleIntercept": 1, "PhotometricInterpretation": kind}
    dataset(np.full((4, 6), 100), **place(0), **tags).save_as("one.dcm", enforce_file_format=True)
    found.append(int(sitk.GetArrayFromImage(sitk.ReadImage("one.dcm")).max()))
print(f"stored 100 of 12 bits, slope 2, intercept 1: MONOCHROME2 {found[0]}, MONOCHROME1 {found[1]}")
same = found == [201, 7991]
print("as stated" if same else "CHANGED")
sys.exit(not same)
PYTHON
