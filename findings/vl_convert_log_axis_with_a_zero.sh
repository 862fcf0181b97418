#!/usr/bin/env bash
# One zero on a log axis makes a whole line flat, without a warning.
#
# Versions: vl-convert-python 1.9.0.post1, Linux.
# A log scale takes its domain from the data. Zero has no logarithm. Vega then draws every point of the line at the same
# height, also the points with a logarithm. So an error of exactly zero in one layer hides the errors of all other layers.
# Give the scale a domain, and raise smaller values to its lower end or leave them out.
#
# Observed: 1, 10, 100, 1000 is a straight line; with 0 or -5 instead of 100, all points are at the same height.
# Exits 0 while this is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "vl-convert-python==1.9.0.post1"
"$folder/env/bin/python" - <<'PY'
import re
import sys

import vl_convert


def heights(*values):
    """Of the points of a line, in pixels from the top."""
    spec = {
        "data": {"values": [{"x": x, "y": y} for x, y in enumerate(values)]},
        "mark": "line",
        "encoding": {
            "x": {"field": "x", "type": "quantitative"},
            "y": {"field": "y", "type": "quantitative", "scale": {"type": "log"}},
        },
    }
    line = re.search(r'aria-roledescription="line mark"[^>]*?d="([^"]*)"', vl_convert.vegalite_to_svg(spec))
    return [float(y) for y in re.findall(r",(-?[\d.]+)", line[1])]


good, zero, negative = heights(1, 10, 100, 1000), heights(1, 10, 0, 1000), heights(1, 10, -5, 1000)
print("1, 10, 100, 1000:", good)
print("1, 10, 0, 1000:", zero)
print("1, 10, -5, 1000:", negative)
sys.exit(0 if len(set(good)) == 4 and len(set(zero)) == len(set(negative)) == 1 else 1)
PY
