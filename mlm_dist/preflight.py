"""What can be known of a run before it waits in a queue for hours: `python -m mlm_dist.preflight RANKS --config C ...`, on any machine that sees the data."""

import sys
from collections.abc import Sequence

from mlm_dist.config import load
from mlm_dist.errors import UserError
from mlm_dist.inputs import DataInputs


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 with the mistake that the run would end with: in the config, its data or tokenizer, or for so many ranks."""
    ranks, *words = sys.argv[1:] if argv is None else argv
    try:
        config = load(words).config
        config.train.check_world(int(ranks))
        config.data.cache_dir = None  # a place on the nodes
        DataInputs(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
