"""`python -m nas` is the same as the command `nas`."""

import sys

from nas.cli import main

sys.exit(main())
