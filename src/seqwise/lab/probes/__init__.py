"""Probes: what is this model sensitive to? One file per probe."""

from seqwise.lab.probes.bags_of_words import BagsOfWords
from seqwise.lab.probes.base import Probe
from seqwise.lab.probes.function_tokens import FunctionTokensProbe
from seqwise.lab.probes.order import Order
from seqwise.lab.probes.prior_distribution import PriorDistribution
from seqwise.lab.probes.sequence_order_recall import SequenceOrderRecall
from seqwise.lab.probes.temporal_grounding import TemporalGrounding
from seqwise.lab.probes.verbatim_memory import VerbatimMemoryProbe

__all__ = ["PROBES"]

PROBES: dict[str, Probe] = {
    probe.name: probe
    for probe in (
        Order(),
        BagsOfWords(),
        SequenceOrderRecall(),
        TemporalGrounding(),
        PriorDistribution(),
        FunctionTokensProbe(),
        VerbatimMemoryProbe(),
    )
}
