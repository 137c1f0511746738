"""python -m lit_phi2"""

import sys

from lit_phi2.cli import main

sys.exit(main())
