"""The digest of the C++ and CUDA sources, by which a prebuilt library is known to be theirs.

`setup.py` runs this file by its path and writes the digest into build_info.json; benchmarks/gpu_check.py compares.
"""

import hashlib
from pathlib import Path


def digest(root: Path) -> str:
    """Return twelve digits that change with any source of a compiled library below `root`."""
    found = hashlib.sha256()
    for path in [*sorted((root / "csrc").rglob("*")), root / "setup.py"]:
        if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py"):
            found.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]
