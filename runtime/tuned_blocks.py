"""Block sizes that somebody measured for their own card: where they lie, how they come into use.

`outrider bench kernels --tune` writes them. No card has made such a file so far.
"""

import logging
import os
from pathlib import Path

import platformdirs

from ..kernels.blocks import BlockTableError, load_table, use_table
from .experts.store_cache import CACHE_VARIABLE

logger = logging.getLogger(__name__)


def tuned_table() -> Path:
    """The file: below $OUTRIDER_CACHE, else below the user's cache folder."""
    root = os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("outrider", False)
    return Path(root).expanduser().absolute() / "blocks.json"


def use_tuned_blocks() -> int:
    """Let the measured sizes go before the shipped ones; returns how many there are.

    Without the file nothing changes; a damaged one is left alone with a warning, since block sizes
    decide speed and never results.
    """
    path = tuned_table()
    try:
        table = load_table(path)
    except OSError:
        return 0
    except BlockTableError as error:
        logger.warning("%s; the sizes that are shipped are used", error)
        return 0
    use_table(table)
    logger.info("block sizes of %d kernels from %s", len(table), path)
    return len(table)
