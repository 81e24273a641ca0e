"""Every published way to train a language model, as a part you can switch on, combine and prove."""

from typing import Final

__version__: Final = "0.1.0"
