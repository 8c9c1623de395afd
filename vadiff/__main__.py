"""`python -m vadiff`, for torchrun."""

import sys

from .cli import main

sys.exit(main())
