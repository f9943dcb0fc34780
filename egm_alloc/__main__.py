"""``python -m egm_alloc``: the command line."""

import sys

from egm_alloc.cli import main

if __name__ == "__main__":
    sys.exit(main())
