"""``python -m visionkernels``: the command, from a checkout too."""

import sys

from visionkernels.cli import main

sys.exit(main())
