"""``python -m veloxlab.cli`` is the command ``veloxlab``, also without an installation."""

import sys

from veloxlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
