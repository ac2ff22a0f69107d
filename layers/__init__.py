"""Layers: hyper-parameters, declared parameters and a pure apply."""

from bestiary.layers.activations import (
    Elu,
    Gelu,
    GeluTanh,
    LeakyRelu,
    PolyNorm,
    PolyReLU,
    Relu,
    ReluSquared,
    Selu,
    Sigmoid,
    Silu,
    Softplus,
    Tanh,
)
from bestiary.layers.afkan import AFKAN, AFKANFFN
from bestiary.layers.attention import Attention
from bestiary.layers.base import (
    Aux,
    Context,
    Cost,
    Count,
    Layer,
    Param,
    Precision,
    constant,
    layer,
    normal,
    ones,
    weight,
    zeros,
)
from bestiary.layers.batch_norm import BatchNorm
from bestiary.layers.blockffn import AdaptiveFactor, BlockFFN
from bestiary.layers.cache import CachePolicy, Full, SinksWindow
from bestiary.layers.cache_eviction import H2O, SnapKV
from bestiary.layers.cache_kivi import KIVI
from bestiary.layers.causal_conv import CausalConv
from bestiary.layers.clipped import Clipped
from bestiary.layers.compression import LearnedMLP, MeanPool
from bestiary.layers.delta_rule import GatedDeltaNet
from bestiary.layers.depth import MixtureOfDepths
from bestiary.layers.din import LocalActivationUnit, SumPooling
from bestiary.layers.dsa import DSA
from bestiary.layers.engram import Engram
from bestiary.layers.feedforward import GLU, MLP, Parallel
from bestiary.layers.grkan import GRKAN
from bestiary.layers.kan import KAN
from bestiary.layers.kan_bases import RBF, RSWAF, Fourier, Rational, ReLUBasis, Sine
from bestiary.layers.kan_basis import Basis
from bestiary.layers.kan_conv import KANConv, KANPatches
from bestiary.layers.kan_net import KANFFN, KANNet
from bestiary.layers.kan_polynomials import Chebyshev, Gram, Jacobi, Legendre
from bestiary.layers.kan_spline import BSpline
from bestiary.layers.kan_wavelets import Wavelet
from bestiary.layers.learned_activations import Dice, Interpolated, PReLU
from bestiary.layers.linear import Embedding, Linear
from bestiary.layers.linear_attention import GatedLinearAttention
from bestiary.layers.mamba import Mamba
from bestiary.layers.mamba2 import Mamba2
from bestiary.layers.memory import PEER, PKM, MemoryPlus, MemoryTable
from bestiary.layers.mla import MLA
from bestiary.layers.moba import MoBA
from bestiary.layers.moe import MoE
from bestiary.layers.mohd import Fusion, MoHDFFN, MoHDResidual, SubDimensions
from bestiary.layers.mole import LatentExperts, LatentGLU
from bestiary.layers.norms import LayerNorm, RMSNorm
from bestiary.layers.nsa import NSA
from bestiary.layers.perceptron import Perceptron
from bestiary.layers.performer import Performer
from bestiary.layers.qkan import HQKAN, QKAN
from bestiary.layers.rational import GroupRational
from bestiary.layers.repeat import Chain, Repeat
from bestiary.layers.rope import Rope
from bestiary.layers.router import Router
from bestiary.layers.sharding import AXES, DEFAULT_RULES, dot, pspec, shard, take, use_rules
from bestiary.layers.shared_kv import SharedAttention, SharedKV
from bestiary.layers.skan import SKAN, SKANFFN, SConvKAN
from bestiary.layers.skan_select import PrunedSKAN
from bestiary.layers.spark import GaussianGLU, SparkAttention, SparkFFN
from bestiary.layers.ultramem import UltraMem, UltraMemV2

__all__ = [
    "AFKAN",
    "AFKANFFN",
    "AXES",
    "DEFAULT_RULES",
    "DSA",
    "GLU",
    "GRKAN",
    "H2O",
    "HQKAN",
    "KAN",
    "KANFFN",
    "KIVI",
    "MLA",
    "MLP",
    "NSA",
    "PEER",
    "PKM",
    "QKAN",
    "RBF",
    "RSWAF",
    "SKAN",
    "SKANFFN",
    "AdaptiveFactor",
    "Attention",
    "Aux",
    "BSpline",
    "Basis",
    "BatchNorm",
    "BlockFFN",
    "CachePolicy",
    "CausalConv",
    "Chain",
    "Chebyshev",
    "Clipped",
    "Context",
    "Cost",
    "Count",
    "Dice",
    "Elu",
    "Embedding",
    "Engram",
    "Fourier",
    "Full",
    "Fusion",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GaussianGLU",
    "Gelu",
    "GeluTanh",
    "Gram",
    "GroupRational",
    "Interpolated",
    "Jacobi",
    "KANConv",
    "KANNet",
    "KANPatches",
    "LatentExperts",
    "LatentGLU",
    "Layer",
    "LayerNorm",
    "LeakyRelu",
    "LearnedMLP",
    "Legendre",
    "Linear",
    "LocalActivationUnit",
    "Mamba",
    "Mamba2",
    "MeanPool",
    "MemoryPlus",
    "MemoryTable",
    "MixtureOfDepths",
    "MoBA",
    "MoE",
    "MoHDFFN",
    "MoHDResidual",
    "PReLU",
    "Parallel",
    "Param",
    "Perceptron",
    "Performer",
    "PolyNorm",
    "PolyReLU",
    "Precision",
    "PrunedSKAN",
    "RMSNorm",
    "Rational",
    "ReLUBasis",
    "Relu",
    "ReluSquared",
    "Repeat",
    "Rope",
    "Router",
    "SConvKAN",
    "Selu",
    "SharedAttention",
    "SharedKV",
    "Sigmoid",
    "Silu",
    "Sine",
    "SinksWindow",
    "SnapKV",
    "Softplus",
    "SparkAttention",
    "SparkFFN",
    "SubDimensions",
    "SumPooling",
    "Tanh",
    "UltraMem",
    "UltraMemV2",
    "Wavelet",
    "constant",
    "dot",
    "layer",
    "normal",
    "ones",
    "pspec",
    "shard",
    "take",
    "use_rules",
    "weight",
    "zeros",
]
