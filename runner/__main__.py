"""`python -m runner` is the command `buddyrun`."""

import sys

from runner.cli import main

sys.exit(main())
