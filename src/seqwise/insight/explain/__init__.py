"""Which input tokens caused this output; one file per paper."""

from seqwise.insight.explain.lexrank import LexRank
from seqwise.insight.explain.reagent import ReAGent
from seqwise.insight.explain.saliency_verbalization import SaliencyVerbalization
from seqwise.insight.explain.token_activation_map import TokenActivationMap

__all__ = ["LexRank", "ReAGent", "SaliencyVerbalization", "TokenActivationMap"]
