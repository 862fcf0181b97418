#!/usr/bin/env bash
# A NaN or an infinity in a message of a Jupyter kernel reaches the page as the text "nan" or "inf".
#
# Versions: jupyter_client 8.10.0, Linux.
# JSON has no NaN. `Session.pack` first refuses the message, then converts each such float to a string. The warning goes
# to the kernel's standard error, which most users never see. So a number in the state of a widget (ipywidgets,
# anywidget) becomes a string in JavaScript. There "nan" > 1 is false, "nan" + 1 is "nan1", and charts stay empty.
# Send null, or leave the number out.
#
# Observed: {"x": NaN, "y": [inf], "z": 1.5} arrives as {"x": "nan", "y": ["inf"], "z": 1.5}.
# Exits 0 while this is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jupyter_client==8.10.0"
"$folder/env/bin/python" -W ignore - <<'PY'
import json
import math
import sys

from jupyter_client.session import Session

session = Session(key=b"")
state = {"x": math.nan, "y": [math.inf], "z": 1.5}
sent = json.loads(session.serialize(session.msg("comm_msg", content={"state": state}))[-1])["state"]
print("state of a widget:", state)
print("what is sent:", sent)
sys.exit(0 if sent == {"x": "nan", "y": ["inf"], "z": 1.5} else 1)
PY
