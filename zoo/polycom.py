"""PolyCom (Zhuo et al. 2024, arXiv 2411.03884): Llama with polynomial composition activations."""

from bestiary.layers.activations import PolyNorm
from bestiary.layers.feedforward import MLP
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.llama import byte_llama, llama, multi_head
from bestiary.zoo.mixtures import olmoe, olmoe_ffn


def polycom_tiny() -> Decoder:
    """`llama_tiny` with PolyNorm feed-forwards of equal parameters: 1.5 times the gated width."""
    return byte_llama(4, 128, MLP(dim=128, hidden=480, activation=PolyNorm()))


def polycom_1b_dense() -> Decoder:
    """The paper's dense model: non-gated PolyNorm feed-forwards, 1.5 times the SwiGLU width."""
    ffn = MLP(dim=2048, hidden=8256, activation=PolyNorm())
    return llama(vocab_size=32000, num_layers=24, attention=multi_head(2048, 16), ffn=ffn)


def polycom_olmoe_1b7b() -> Decoder:
    """The paper's mixture: OLMoE with non-gated PolyNorm experts, 1.5 times the SwiGLU width."""
    expert = MLP(dim=2048, hidden=1536, activation=PolyNorm())
    return olmoe(16, 2048, 16, olmoe_ffn(2048, 64, 8, expert))
