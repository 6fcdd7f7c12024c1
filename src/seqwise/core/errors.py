"""What can go wrong, in words that say what to do. Everything a user causes derives from `SeqwiseError`."""


class SeqwiseError(Exception):
    """Base of the library's own errors; the message is one line a user can act on."""


class UnsupportedModel(SeqwiseError):
    """The model lacks a part that the method needs; names the part and what to use instead."""


class SlotConflict(SeqwiseError, ValueError):
    """Two composed methods claim the same slot."""


class AlreadyAttached(SeqwiseError, RuntimeError):
    """The model already runs under a method, or the run is entered twice."""


class PromptError(SeqwiseError, ValueError):
    """The prompt does not fit the method: too short, empty, or its segments do not match."""


class CacheError(SeqwiseError, ValueError):
    """A cache that this run cannot use: foreign, of another model, static or offloaded."""


class MissingExtra(SeqwiseError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


class UsageError(SeqwiseError, ValueError):
    """Input of a command or function that cannot be used; the message names field, range and value."""
