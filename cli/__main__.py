"""``python -m cli``: the same as ``gossamer``, for starting nodes with this very interpreter."""

import sys

from cli.main import main

sys.exit(main())
