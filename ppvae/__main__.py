"""`python -m ppvae`."""

import sys

from ppvae.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
