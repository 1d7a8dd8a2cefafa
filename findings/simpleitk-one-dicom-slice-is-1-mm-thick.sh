#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): a DICOM series of one slice has a spacing of 1 mm across it, whatever its SliceThickness.
#
# Both ReadImage of the file and ImageSeriesReader give 1.0 as the third spacing, without a warning, so that every volume
# that is computed from it is off by the thickness. The tag is in the metadata dictionary (0018|0050) of ReadImage.
#
# Output seen:
# SimpleITK 2.5.7 with ITK 5.4
# SliceThickness 3: spacing (1.25, 1.5, 1.0) by ReadImage, (1.25, 1.5, 1.0) by ImageSeriesReader
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


dataset(np.ones((4, 6)), **place(0)).save_as("one.dcm", enforce_file_format=True)
reader = sitk.ImageSeriesReader()
reader.SetFileNames(["one.dcm"])
found = sitk.ReadImage("one.dcm").GetSpacing(), reader.Execute().GetSpacing()
print(f"SliceThickness 3: spacing {found[0]} by ReadImage, {found[1]} by ImageSeriesReader")
same = found == ((1.25, 1.5, 1),) * 2
print("as stated" if same else "CHANGED")
sys.exit(not same)
PYTHON
