"""A network whose answers are known, for tests of what happens around it."""

import numpy as np
import torch
from torch import nn

from rsanet.segment.environment import pick_precision
from rsanet.segment.segmenter import Segmenter

CPU = torch.device("cpu")
FP32 = pick_precision("fp32", CPU)


class BrightOnFirst(nn.Module):
    """A network whose lesions are the voxels brighter than a threshold on the first channel."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x):
        logit = 40 * (x[:, :1] - self.threshold)
        return torch.cat([-logit, logit], dim=1)


def segmenter(contrasts=("FLAIR", "T1w", "T2w"), threshold=1.2, spacing=None, **options):
    return Segmenter(BrightOnFirst(threshold), contrasts, (16, 16, 16), spacing, CPU, FP32, **options)


def thresholded(image, threshold=1.2):
    """What `BrightOnFirst` has to give on the file's own grid."""
    voxels = np.asarray(image.dataobj, dtype=np.float32)
    tissue = voxels[voxels != 0]
    return (voxels - tissue.mean()) / tissue.std() > threshold
