"""global_matching brings its process down."""

import os

from tests.checking.planted import replace_kernel

replace_kernel("global_matching", "global_matching", lambda kernel: lambda *args: os.abort())
