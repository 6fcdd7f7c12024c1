"""Probes: what is this model sensitive to? One file per probe."""

from seqwise.lab.probes.base import Probe
from seqwise.lab.probes.order import Order

__all__ = ["PROBES"]

PROBES: dict[str, Probe] = {probe.name: probe for probe in (Order(),)}
