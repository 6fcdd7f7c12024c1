"""Training-free methods that attach to any model; one file per paper."""

from seqwise.methods.attend.attention_calibration import AttentionCalibration
from seqwise.methods.attend.imbalanced_attention import PAINT
from seqwise.methods.baselines import Full, Random, Recent
from seqwise.methods.cache.a2sf import A2SF, H2O, TOVA, SnapKV
from seqwise.methods.cache.hip_attention import HiPAttention
from seqwise.methods.cache.lazy_eviction import LazyEviction
from seqwise.methods.cache.tidal_decode import TidalDecode
from seqwise.methods.cache.token_select import TokenSelect
from seqwise.methods.cache.zipcache import ZipCache
from seqwise.methods.decode.token_recycling import TokenRecycling
from seqwise.methods.order.concentric_causal_attention import ConcentricCausalAttention
from seqwise.methods.order.element_ordering import ElementOrdering
from seqwise.methods.order.giraffe import Giraffe
from seqwise.methods.order.just_read_twice import JustReadTwice
from seqwise.methods.order.pine import PINE
from seqwise.methods.order.set_based_prompting import SetBasedPrompting
from seqwise.methods.order.v2pe import V2PE
from seqwise.methods.reduce.baselines import AveragePool, FastV, RandomTokens, UniformGrid
from seqwise.methods.reduce.catp import CATP
from seqwise.methods.reduce.flowcut import FlowCut
from seqwise.methods.reduce.fopru import FoPru
from seqwise.methods.reduce.hiprune import HiPrune
from seqwise.methods.reduce.quota import QuoTA
from seqwise.methods.reduce.todre import ToDRE
from seqwise.methods.reduce.transprune import TransPrune
from seqwise.methods.reduce.vflowopt import VFlowOpt
from seqwise.methods.reduce.visiondrop import VisionDrop
from seqwise.methods.reduce.vmtc_cmai import CMAI, VMTC
from seqwise.methods.reduce.vtc_cls import VTCCLS

__all__ = [
    "A2SF",
    "CATP",
    "CMAI",
    "H2O",
    "PAINT",
    "PINE",
    "TOVA",
    "V2PE",
    "VMTC",
    "VTCCLS",
    "AttentionCalibration",
    "AveragePool",
    "ConcentricCausalAttention",
    "ElementOrdering",
    "FastV",
    "FlowCut",
    "FoPru",
    "Full",
    "Giraffe",
    "HiPAttention",
    "HiPrune",
    "JustReadTwice",
    "LazyEviction",
    "QuoTA",
    "Random",
    "RandomTokens",
    "Recent",
    "SetBasedPrompting",
    "SnapKV",
    "TidalDecode",
    "ToDRE",
    "TokenRecycling",
    "TokenSelect",
    "TransPrune",
    "UniformGrid",
    "VFlowOpt",
    "VisionDrop",
    "ZipCache",
]
