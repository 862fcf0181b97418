"""What has to be so before a test, or nbval, imports anything large: `tests.nbval_tolerance` imports this first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import platformdirs

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a worker has a core of its own, and so have its kernels

if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    # a run starts a hundred Pythons, and none compiles again what another has, now or in the next run; nothing is
    # written beside the sources
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(sys.prefix) / "bytecode"))
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]

# whatever folder a test takes for its own files, loops are not compiled again
os.environ.setdefault("NUMBA_CACHE_DIR", str(platformdirs.user_cache_path("veloxlab") / "loops"))

import veloxlab  # noqa: F401 - the fast BLAS before MLX; and no grammar of IRIs, for a second, before nbval
