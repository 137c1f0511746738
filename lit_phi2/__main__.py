"""Run the command line: python -m lit_phi2."""

import sys

from lit_phi2.cli.main import main

sys.exit(main())
