#!/usr/bin/env bash
# MONAI 1.6.1 (with torch 2.13.0 and scipy 1.17.1)
#
# Expected: a case of which nothing was found has the worst Hausdorff distance there is, at whatever percentile, and a
#           mean over cases shows it.
# Happens:  against an empty prediction the Hausdorff distance is infinite, and its 95th percentile is NaN (an
#           interpolation between infinities). The mean of HausdorffDistanceMetric leaves NaN out: with percentile=95
#           the missed case is not counted, and the mean is that of the others. Without a percentile it is infinite. A
#           network that finds nothing in a hard case gets a better mean HD95 than one that finds a part of it.
# Hit:      comparisons of lesion segmentation by a mean HD95: patients with few small lesions are those that are missed.
#
# Output seen:
#   MONAI 1.6.1, torch 2.13.0+cpu
#   percentile None: cases [inf, 3.0], mean inf
#   percentile 95: cases [nan, 3.0], mean 3.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 monai==1.6.1 scipy==1.17.1 >&2
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import math

import monai
import torch
from monai.metrics import HausdorffDistanceMetric

print(f"MONAI {monai.__version__}, torch {torch.__version__}")
lesion, nothing = torch.zeros(1, 1, 9, 9, 9), torch.zeros(1, 1, 9, 9, 9)
lesion[..., 2, 2, 2] = 1
moved = lesion.roll(3, -1)
found = []
for percentile in (None, 95):
    metric = HausdorffDistanceMetric(include_background=True, percentile=percentile)
    metric(nothing, lesion)
    metric(moved, lesion)
    mean, cases = metric.aggregate().item(), metric.get_buffer().ravel().tolist()
    print(f"percentile {percentile}: cases {cases}, mean {mean}")
    found.append((cases[0], mean))
(whole, whole_mean), (most, most_mean) = found
raise SystemExit(0 if math.isinf(whole) and math.isinf(whole_mean) and math.isnan(most) and most_mean == 3 else 1)
PYTHON
