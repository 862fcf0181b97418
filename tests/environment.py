"""Settings before a test, or nbval, imports large packages: `tests.nbval_tolerance` imports this first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import platformdirs

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a worker has one core; its Jupyter kernels inherit this

if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    # a run starts a hundred Pythons: compiled files are shared by all of them and by later runs, and nothing is
    # written beside the sources
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(sys.prefix) / "bytecode"))
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]

# compiled loops are shared too, for any folder that a test uses
os.environ.setdefault("NUMBA_CACHE_DIR", str(platformdirs.user_cache_path("veloxlab") / "loops"))

import veloxlab  # noqa: F401 - the fast BLAS before MLX; and no grammar of IRIs, for a second, before nbval
