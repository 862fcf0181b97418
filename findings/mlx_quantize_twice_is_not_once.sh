#!/usr/bin/env bash
# A second mx.quantize, after mx.dequantize, changes up to a quarter of the groups again.
#
# Versions: mlx 0.32.4, Linux, CPU.
# Values on a group's grid should stay there. But MLX fits scale and bias again, and moves the grid so that zero is
# a level. Some values then round differently: 15 % of groups of 64 change at 4 bits, 23 % at 8 bits in float32, and
# some values move by a whole step. At 2 bits no value moves. So a quantized cache changes if it is decoded, edited (a
# trim, a merge) and quantized again.
#
# Observed with 4,096 groups of normal values (key 0), float32, groups of 64:
#   share of groups that change: 0 at 2 bits, .05 at 3, .15 at 4, .18 at 5, .20 at 6, .23 at 8
# Exits 0 while this is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "mlx[cpu]==0.32.4"
"$folder/env/bin/python" - <<'PY'
import sys

import mlx.core as mx

x = mx.random.normal((4096, 64), key=mx.random.key(0))
changed, moved = {}, {}
for bits in (2, 3, 4, 5, 6, 8):
    once = mx.dequantize(*mx.quantize(x, 64, bits), 64, bits)
    twice = mx.dequantize(*mx.quantize(once, 64, bits), 64, bits)
    changed[bits] = (once != twice).any(-1).mean().item()
    moved[bits] = mx.abs(once - twice).max().item()
print("share of groups that change:", {bits: round(share, 3) for bits, share in changed.items()})
print("largest move of a value:", {bits: round(most, 3) for bits, most in moved.items()})
sys.exit(0 if changed[2] == 0 and 0.1 < changed[4] < 0.2 < changed[8] < 0.3 else 1)
PY
