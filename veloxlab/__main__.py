"""``python -m veloxlab`` is the command ``veloxlab``, also where the package is not installed."""

import sys

from veloxlab.cli import main

sys.exit(main())
