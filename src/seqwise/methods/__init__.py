"""Training-free methods that attach to any model; one file per paper."""

from seqwise.methods.attend.attention_calibration import AttentionCalibration
from seqwise.methods.baselines import Full, Random, Recent
from seqwise.methods.cache.a2sf import A2SF, H2O, TOVA, SnapKV
from seqwise.methods.cache.lazy_eviction import LazyEviction
from seqwise.methods.cache.tidal_decode import TidalDecode
from seqwise.methods.cache.zipcache import ZipCache
from seqwise.methods.decode.token_recycling import TokenRecycling
from seqwise.methods.order.v2pe import V2PE
from seqwise.methods.reduce.flowcut import FlowCut
from seqwise.methods.reduce.fopru import FoPru
from seqwise.methods.reduce.transprune import TransPrune

__all__ = [
    "A2SF",
    "H2O",
    "TOVA",
    "V2PE",
    "AttentionCalibration",
    "FlowCut",
    "FoPru",
    "Full",
    "LazyEviction",
    "Random",
    "Recent",
    "SnapKV",
    "TidalDecode",
    "TokenRecycling",
    "TransPrune",
    "ZipCache",
]
