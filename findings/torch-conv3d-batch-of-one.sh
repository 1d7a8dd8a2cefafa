#!/usr/bin/env bash
# torch 2.13.0, on an x86 CPU
#
# Expected: a volume goes through conv3d as it does beside a copy of itself: the same numbers, and channels_last_3d stays
#           channels_last_3d.
# Happens:  in float32, a batch of one whose channels × depth × height are few (up to 20480, with kernels of 3) is
#           convolved by another routine. The result is contiguous, and its last bits are others than in a batch of two.
#           With more channels or a larger volume the format is kept.
# Hit:      whoever segments one scan at a time on a CPU: layers that are fast in channels_last_3d fall back to slow ones
#           behind such a convolution, and a mask may depend on how many windows were predicted at once.
#
# Output seen:
#   torch 2.13.0+cpu
#   channels × depth × height 16384: channels_last_3d alone False, in a pair True; equal bits False
#   channels × depth × height 32768: channels_last_3d alone True, in a pair True; equal bits True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 >&2
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import torch
from torch.nn import functional

print(f"torch {torch.__version__}")
torch.manual_seed(0)
torch.set_num_threads(1)
layout = torch.channels_last_3d
found = []
for channels in (64, 128):
    volume = torch.randn(1, channels, 16, 16, 16).contiguous(memory_format=layout)
    weight = torch.randn(32, channels, 3, 3, 3).contiguous(memory_format=layout)
    with torch.no_grad():
        alone = functional.conv3d(volume, weight, padding=1)
        pair = functional.conv3d(volume.repeat(2, 1, 1, 1, 1).contiguous(memory_format=layout), weight, padding=1)
    kept = [each.is_contiguous(memory_format=layout) for each in (alone, pair)]
    equal = torch.equal(alone[0], pair[0])
    print(
        f"channels × depth × height {channels * 16 * 16}: channels_last_3d alone {kept[0]}, in a pair {kept[1]}; "
        f"equal bits {equal}"
    )
    found.append((*kept, equal))
raise SystemExit(0 if found[0] == (False, True, False) and found[1][:2] == (True, True) else 1)
PYTHON
