"""`python -m bitgen` is `bitgen`."""

import sys

from bitgen.cli import main

sys.exit(main())
