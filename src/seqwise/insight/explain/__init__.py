"""Which input tokens caused this output; one file per paper."""

from seqwise.insight.explain.reagent import ReAGent

__all__ = ["ReAGent"]
