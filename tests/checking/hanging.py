"""local_attention never answers."""

import time

from tests.checking.planted import replace_kernel

replace_kernel("local_attention", "local_attention_dot", lambda kernel: lambda *args: time.sleep(3600))
