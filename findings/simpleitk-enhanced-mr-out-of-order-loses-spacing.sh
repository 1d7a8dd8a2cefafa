#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): an enhanced (multi-frame) DICOM file whose frames are not stored in the order of space is read
# with a spacing of 1 × 1 × 1 mm, its frames in the order of storage.
#
# The order of the frames is free; the position of each is in its Per-frame Functional Groups (interleaved acquisitions
# are stored so). In order, the spacing is right. Out of order, even the pixel spacing, which all frames share, is lost,
# without an error or a warning, and neighbours in the image are none in space.
#
# Output seen:
# SimpleITK 2.5.7 with ITK 5.4
# frames at 0, 3, 6, 9 mm: spacing (1.25, 1.5, 3.0), slices [10, 20, 30, 40]
# frames at 0, 6, 3, 9 mm: spacing (1.0, 1.0, 1.0), slices [10, 20, 30, 40]; right are (1.25, 1.5, 3.0), [10, 30, 20, 40]
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


(one, ordered), (other, shuffled) = enhanced([0, 3, 6, 9], [1] * 4), enhanced([0, 6, 3, 9], [1] * 4)
right = "right are (1.25, 1.5, 3.0), [10, 30, 20, 40]"
print(f"frames at 0, 3, 6, 9 mm: spacing {one.GetSpacing()}, slices {ordered}")
print(f"frames at 0, 6, 3, 9 mm: spacing {other.GetSpacing()}, slices {shuffled}; {right}")
same = one.GetSpacing() == (1.25, 1.5, 3) and other.GetSpacing() == (1, 1, 1) and shuffled == [10, 20, 30, 40]
print("as stated" if same else "CHANGED")
sys.exit(not same)
PYTHON
