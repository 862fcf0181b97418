#!/usr/bin/env bash
# MLX's quantizers convert NaN to an ordinary number, and most of them convert infinity too.
#
# Versions: mlx 0.32.4, Linux, CPU.
# There is no error, so a quantized array hides an overflow of its source. A range check after the quantizer, or of a
# model's output, finds nothing. Check before you quantize (`mx.isfinite`).
#
# Observed after decoding, for a group of ones in which the first is NaN or infinity:
#   mx.to_fp8: 448 for both (E4M3 has a code for NaN, and mx.from_fp8 reads it)
#   mx.quantize affine, 4 bits: NaN becomes 1, the others stay; infinity makes the whole group NaN
#   mxfp8: 896 for the first and for its neighbours; nvfp4 and mxfp4: 0 for the whole group
# Exits 0 while this is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "mlx[cpu]==0.32.4"
"$folder/env/bin/python" - <<'PY'
import math
import sys

import mlx.core as mx


def quantized(bad, group, bits, mode):
    x = mx.ones((1, 64))
    x[0, 0] = bad
    decoded = mx.dequantize(*mx.quantize(x, group, bits, mode=mode), group_size=group, bits=bits, mode=mode)
    return decoded.astype(mx.float32)[0, :2].tolist()


seen = {}
for bad in (math.nan, math.inf):
    seen["to_fp8", bad] = mx.from_fp8(mx.to_fp8(mx.array([bad, 1.0])), mx.float32).tolist()
    for mode, group, bits in (("affine", 64, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4), ("mxfp4", 32, 4)):
        seen[mode, bad] = quantized(bad, group, bits, mode)
for (name, bad), numbers in seen.items():
    print(f"{name:7} of [{bad}, 1, 1, ...]: {numbers}")
holds = [seen["to_fp8", bad] == [448.0, 1.0] for bad in (math.nan, math.inf)]
holds += [seen["affine", math.nan] == [1.0, 1.0], math.isnan(seen["affine", math.inf][1])]
holds += [all(map(math.isfinite, seen[mode, math.nan])) for mode in ("mxfp8", "nvfp4", "mxfp4")]
sys.exit(0 if all(holds) else 1)
PY
