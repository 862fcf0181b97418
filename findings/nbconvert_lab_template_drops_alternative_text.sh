#!/usr/bin/env bash
# The default HTML template of nbconvert drops the alternative text of a picture, which its older template shows.
#
# Versions: nbconvert 7.17.2, Linux.
# A saved output says what its picture shows in its metadata, {"image/png": {"alt": "..."}}. `--template classic` writes
# that as the picture's `alt`. The template `lab`, which is the default, does not read it, and nbconvert then writes
# "No description has been provided for this image", so that a screen reader says that there is none.
#
# Seen: lab has no description, classic has "a red dot".
# Exits 0 while that is so, 1 once it changes.
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
