"""The command `flaxcompress`: a thin shell over the library's functions, one file for each verb."""

from flaxcompress.cli.main import main
from flaxcompress.cli.verbs import VERBS

__all__ = ["VERBS", "main"]
