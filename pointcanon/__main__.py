"""``python -m pointcanon``: the command line."""

import sys

from pointcanon.cli import main

sys.exit(main())
