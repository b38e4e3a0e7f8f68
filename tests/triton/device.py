"""Where the tests of the Triton kernels run: in Triton's interpreter (TRITON_INTERPRET=1) or on a GPU; else nowhere."""

import pytest
import torch

from tests.effort import interpreter_reason_not
from vosops.ops._registration import HAS_TRITON, TRITON_INTERPRETED

if not HAS_TRITON or not (TRITON_INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs triton, and TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)

if TRITON_INTERPRETED and (reason := interpreter_reason_not()):
    pytest.skip(reason, allow_module_level=True)

DEVICE = "cpu" if TRITON_INTERPRETED else "cuda"
