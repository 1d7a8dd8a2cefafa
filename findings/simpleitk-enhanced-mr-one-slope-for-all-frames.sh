#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): all frames of an enhanced (multi-frame) DICOM file are scaled by the first frame's slope.
#
# Enhanced MR gives RescaleSlope and RescaleIntercept for each frame (Pixel Value Transformation Sequence in the Per-frame
# Functional Groups), and the frames may differ. ReadImage applies those of the first frame to all, without an error or
# a warning. The tags of the frames are not in the metadata dictionary, so that a caller cannot see it either.
#
# Output seen:
# SimpleITK 2.5.7 with ITK 5.4
# stored 10, 20, 30 with slopes 1, 0.5, 4: read [10, 20, 30], right are [10, 10, 120]
# stored 10, 20, 30 with slopes 4, 0.5, 1: read [40, 80, 120], right are [40, 10, 30]
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
from pydicom.uid import ExplicitVRLittleEndian, EnhancedMRImageStorage, generate_uid

print("SimpleITK", sitk.Version.VersionString(), "with ITK", sitk.Version.ITKVersionString())


def dataset(pixels, **tags):
    found = Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.SOPClassUID = found.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    found.SOPInstanceUID = found.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    found.Modality, found.StudyInstanceUID, found.SeriesInstanceUID = "MR", "1.2.3", "1.2.3.4"
    found.Rows, found.Columns = pixels.shape[-2:]
    found.BitsAllocated, found.BitsStored, found.HighBit, found.PixelRepresentation = 16, 16, 15, 0
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(found, name, value)
    return found


def items(**tags):
    found = Dataset()
    for name, value in tags.items():
        setattr(found, name, value)
    return [found]


def enhanced(heights, slopes):
    frames = [
        items(
            PlanePositionSequence=items(ImagePositionPatient=[0, 0, height]),
            PixelValueTransformationSequence=items(RescaleSlope=slope, RescaleIntercept=0, RescaleType="US"),
        )[0]
        for height, slope in zip(heights, slopes, strict=True)
    ]
    shared = items(
        PlaneOrientationSequence=items(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelMeasuresSequence=items(PixelSpacing=[1.5, 1.25], SliceThickness=3),
    )
    pixels = np.stack([np.full((4, 6), 10 * (number + 1)) for number in range(len(frames))])
    groups = {"SharedFunctionalGroupsSequence": shared, "PerFrameFunctionalGroupsSequence": frames}
    found = dataset(pixels, NumberOfFrames=len(frames), InstanceNumber=1, **groups)
    found.save_as("enhanced.dcm", enforce_file_format=True)
    image = sitk.ReadImage("enhanced.dcm")
    return image, [each.max().item() for each in sitk.GetArrayFromImage(image)]


one, other = enhanced([0, 3, 6], [1, 0.5, 4])[1], enhanced([0, 3, 6], [4, 0.5, 1])[1]
print(f"stored 10, 20, 30 with slopes 1, 0.5, 4: read {one}, right are [10, 10, 120]")
print(f"stored 10, 20, 30 with slopes 4, 0.5, 1: read {other}, right are [40, 10, 30]")
same = one == [10, 20, 30] and other == [40, 80, 120]
print("as stated" if same else "CHANGED")
sys.exit(not same)
PYTHON
