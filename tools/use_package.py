"""Uses an installed vosops: what it says of itself, an op in its compiled library against the reference, an error."""

import platform
import sys

import torch

import vosops
from vosops import info


def main() -> None:
    """Fail unless the compiled library serves and is right."""
    if not vosops.__file__.startswith(sys.prefix):
        sys.exit(f"vosops is not installed here: {vosops.__file__}")
    facts = info.collect()
    if not facts["cpu"]["library"] or not facts["build"].get("summary", "").startswith("built cpu_"):
        sys.exit(f"no compiled library: {facts['cpu']['library_missing']}, {facts['build']}")
    if platform.machine() == "aarch64" and facts["cpu"]["library"] != "neon":
        sys.exit(f"the library for this processor is neon, {facts['cpu']['library']} was loaded")
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 16, 24, 32)
    mask = torch.rand(1, 2, 24, 32) < 0.4
    results = []
    for backend in ("cpp", "reference"):
        with vosops.use_backend(backend):
            results.append(vosops.global_matching(query, key, mask))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    try:  # an exception must find its way from the library through PyTorch: not so between two C++ runtimes
        torch.ops.vosops.conv3x3_winograd(torch.zeros(1), torch.zeros(1), None, None, False)
    except RuntimeError:
        pass
    else:
        sys.exit("a wrong shape was taken")
    print(f"vosops {vosops.__version__} on torch {torch.__version__}: {facts['build']['summary']}")


if __name__ == "__main__":
    main()
