#!/usr/bin/env bash
# mx.quantize(mode="nvfp4") turns small numbers into zeros and clips large numbers, without an error.
#
# Versions: mlx 0.32.4, Linux, CPU.
# NVIDIA's format has two scales: an E4M3 number for each 16 values, and a float32 for the whole tensor. MLX stores only
# the first. E4M3 covers 2^-9 to 448, and a code at most 6. So a block with a largest value below about 0.006 becomes
# zeros, and no decoded value is larger than 2,688. Scale a tensor yourself before you quantize it. mxfp4, with a power
# of two as its scale, has the same small error at every size, and so have mxfp8 and the affine mode.
#
# Observed, relative squared error of normal values of a size (key 0): nvfp4 1.0 at 1e-4 and 1e-3, .015 at .01, .009 at 1,
# .011 at 1,000, .65 at 10,000; mxfp4 .013 to .014 at all of them.
# Exits 0 while this is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "mlx[cpu]==0.32.4"
"$folder/env/bin/python" - <<'PY'
import sys

import mlx.core as mx

lost = {}
for size in (1e-4, 1e-3, 1e-2, 1.0, 1e3, 1e4):
    x = mx.random.normal((64, 64), key=mx.random.key(0)) * size
    for mode, group in (("nvfp4", 16), ("mxfp4", 32)):
        decoded = mx.dequantize(*mx.quantize(x, group, 4, mode=mode), group_size=group, bits=4, mode=mode)
        lost[mode, size] = (mx.square(decoded - x).sum() / mx.square(x).sum()).item()
for (mode, size), error in lost.items():
    print(f"{mode} at {size:g}: {error:.3f}")
right = all(lost["mxfp4", size] < 0.02 for _, size in lost)
wrong = lost["nvfp4", 1e-3] == lost["nvfp4", 1e-4] == 1 and lost["nvfp4", 1e4] > 0.5
sys.exit(0 if right and wrong and lost["nvfp4", 1.0] < 0.02 else 1)
PY
