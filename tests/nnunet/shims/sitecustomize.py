"""Lets torchvision load beside a CPU build of torch, in the processes that the tests start.

The torchvision of PyPI is built for CUDA. Beside a CPU build of torch its operators are missing, and its import fails
where it describes them. nnU-Net needs none of them, only that timm, which imports torchvision, can be imported.
"""

import sys
import types

sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
