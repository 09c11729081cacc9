"""`python -m tui` is `buddyrun`."""

import sys

from tui.start import main

sys.exit(main())
