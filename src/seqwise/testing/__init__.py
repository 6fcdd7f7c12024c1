"""The method contract, for our methods and yours: `check(MyMethod(budget=8), FAMILIES["llama"])`.

Nine items (identity, restore, padding, less work, settings, errors, composition, determinism, report) that every method
keeps on every model family, or refuses with a reason.
"""

from seqwise.testing.contract import ITEMS, cell, check, examples, home, record
from seqwise.testing.families import FAMILIES, Batch, Family

__all__ = ["FAMILIES", "ITEMS", "Batch", "Family", "cell", "check", "examples", "home", "record"]
