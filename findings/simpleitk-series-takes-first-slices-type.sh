#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): ImageSeriesReader reads all slices of a DICOM series in the pixel type of the first.
#
# Slices of an MR series may differ in RescaleSlope and RescaleIntercept. GDCM gives each file the type that its own
# scaling needs (here uint16 for the first slice, float64 for one of slope 0.004, int32 for one of intercept -500), but the
# series is made in the first one's: fractions are cut off and negative values wrap around, without an error or a warning.
# SetOutputPixelType(sitk.sitkFloat32) gives the right values.
#
# Output seen:
# SimpleITK 2.5.7 with ITK 5.4
# slopes 1, 0.004, 0.004: maxima [79, 0, 1], right are [79, 0.716, 1.116]; as float32 [79.0, 0.716, 1.116]
# intercepts 0, -500, -500: minima [0, 65136, 65236], right are [0, -400, -300]; as float32 [0.0, -400.0, -300.0]
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


def read(name, values, slopes, intercepts, kind=None):
    files = []
    for number, value in enumerate(values):
        scaling = {"RescaleSlope": slopes[number], "RescaleIntercept": intercepts[number]}
        files.append(f"{name}{number}.dcm")
        slice_ = dataset(np.full((4, 6), value), **place(number, (0, 0, 3 * number)), **scaling)
        slice_.save_as(files[-1], enforce_file_format=True)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    if kind:
        reader.SetOutputPixelType(kind)
    return [round(each.max().item(), 3) for each in sitk.GetArrayFromImage(reader.Execute())]


sloped = ("a", [79, 179, 279], [1, 0.004, 0.004], [0, 0, 0])
shifted = ("b", [0, 100, 200], [1, 1, 1], [0, -500, -500])
one, other = read(*sloped), read(*shifted)
floats = read(*sloped, sitk.sitkFloat32), read(*shifted, sitk.sitkFloat32)
print(f"slopes 1, 0.004, 0.004: maxima {one}, right are [79, 0.716, 1.116]; as float32 {floats[0]}")
print(f"intercepts 0, -500, -500: minima {other}, right are [0, -400, -300]; as float32 {floats[1]}")
same = one == [79, 0, 1] and other == [0, 65136, 65236] and floats == ([79, 0.716, 1.116], [0, -400, -300])
print("as stated" if same else "CHANGED")
sys.exit(not same)
PYTHON
