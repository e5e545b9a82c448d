"""`python -m dafm_ray` is the `dafm` command."""

import sys

from dafm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
