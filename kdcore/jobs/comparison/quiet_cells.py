"""Importing this module hides the warnings that libraries log.

The server of a comparison's cells imports it first, if the comparison hides them too.
"""

import logging

logging.disable(logging.WARNING)
