"""``python -m mlm_dist.doctor``, for launchers that start a module."""

import sys

from mlm_dist.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
