"""local_attention never answers, by the pieces or as a whole."""

import time

from tests.checking.planted import replace_kernel

for kernel in ("local_attention_dot", "local_attention_whole"):
    replace_kernel("local_attention", kernel, lambda kernel: lambda *args: time.sleep(3600))
