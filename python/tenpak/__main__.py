"""`python -m tenpak` is the console script."""

import sys

from tenpak.cli import main

if __name__ == "__main__":
    sys.exit(main())
