#!/usr/bin/env bash
# A slice in MLX keeps all of its array alive, and `nbytes` does not say so; `mx.concatenate` of one slice is a slice.
#
# Versions: mlx 0.32.4, Linux, CPU.
# A slice is a view, as in NumPy. `nbytes` counts its own numbers. One would think that concatenating, or converting to
# the type that it has, makes a copy: neither does where there is nothing to join or to convert. A cache that keeps four
# tokens of a prompt in this way holds the whole prompt, and reports four tokens. `mx.contiguous` and `mx.array` copy.
#
# Seen, with 10 of 25,000,000 float32 numbers kept and the array itself deleted (nbytes: 40):
#   slice, mx.concatenate([slice]), slice.astype(same type): 100,000,000 bytes live; mx.contiguous, mx.array: 40
# Exits 0 while that is so, 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "mlx[cpu]==0.32.4"
"$folder/env/bin/python" - <<'PY'
import gc
import sys

import mlx.core as mx

mx.set_default_device(mx.cpu)
ways = {
    "slice": lambda x: x,
    "concatenate": lambda x: mx.concatenate([x]),
    "astype": lambda x: x.astype(mx.float32),
    "contiguous": mx.contiguous,
    "array": mx.array,
}
live = {}
for name, way in ways.items():
    before = mx.get_active_memory()
    whole = mx.zeros(25_000_000)
    mx.eval(whole)
    kept = way(whole[:10])
    mx.eval(kept)
    del whole
    gc.collect()
    live[name] = mx.get_active_memory() - before
    print(f"{name:11} nbytes {kept.nbytes}, live {live[name]:,}")
    del kept
large = [name for name, nbytes in live.items() if nbytes >= 100_000_000]
sys.exit(0 if large == ["slice", "concatenate", "astype"] else 1)
PY
