#!/usr/bin/env bash
# nbconvert's default HTML template drops the alternative text of an image. Its older template shows it.
#
# Versions: nbconvert 7.17.2, Linux.
# A saved output describes its image in its metadata, {"image/png": {"alt": "..."}}. `--template classic` writes
# this as the image's `alt`. The default template, `lab`, does not read it. nbconvert then writes
# "No description has been provided for this image", so a screen reader reports that there is no description.
#
# Observed: lab has no description, classic has "a red dot".
# Exits 0 while this is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "nbconvert==7.17.2"
"$folder/env/bin/python" - <<'PY'
import re
import sys

import nbformat
from nbconvert import HTMLExporter

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
data, metadata = {"image/png": DOT, "text/plain": "dot"}, {"image/png": {"alt": "a red dot"}}
output = nbformat.v4.new_output("display_data", data=data, metadata=metadata)
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("dot", outputs=[output])])
found = {}
for template in ("lab", "classic"):
    page, _ = HTMLExporter(template_name=template).from_notebook_node(notebook)
    found[template] = re.findall(r'<img[^>]*alt="([^"]*)"', page)
print(found)
sys.exit(0 if found["classic"] == ["a red dot"] and found["lab"] != ["a red dot"] else 1)
PY
