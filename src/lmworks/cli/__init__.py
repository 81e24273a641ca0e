"""Floor 6: the verbs. Each file is one verb; it reads the command line, calls the wings, and shows what they answer."""

from lmworks.cli.app import main

__all__ = ["main"]
