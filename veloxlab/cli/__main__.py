"""``python -m veloxlab.cli`` is the command ``veloxlab``, also where the package is not installed."""

import sys

from veloxlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
