"""seqwise: which tokens of a sequence matter, in what order they come, and what to do with them.

from seqwise.methods import A2SF, ZipCache
with (A2SF(budget=1024) | ZipCache()).on(model) as run:
    model.generate(**batch)
print(run)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqwise.core.method import Method
    from seqwise.core.prepare import prepare
    from seqwise.core.segments import Segments

__version__ = "0.1.0"
__all__ = ["Method", "Segments", "prepare"]


def __getattr__(name: str) -> Any:  # imports torch only when something of the engine is used
    if name == "Method":
        from seqwise.core.method import Method

        return Method
    if name == "Segments":
        from seqwise.core.segments import Segments

        return Segments
    if name == "prepare":
        from seqwise.core.prepare import prepare

        return prepare
    raise AttributeError(f"module 'seqwise' has no attribute {name!r}")
