"""`python -m nemo_ext` runs the `nemo-ext` command."""

import sys

from nemo_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
