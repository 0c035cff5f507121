"""`python -m sage_hub`, as torchrun starts it."""

import sys

from sage_hub.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
