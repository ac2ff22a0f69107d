"""Spark Transformer (2025, arXiv 2506.06644): sparse feed-forwards and attention in known
decoders."""

from bestiary.layers.spark import SparkAttention, SparkFFN
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.gemma2 import gemma2
from bestiary.zoo.llama import byte_llama


def spark_tiny() -> Decoder:
    """`llama_tiny` with Spark feed-forwards of equal parameters: 1.5 times the gated width."""
    return byte_llama(4, 128, SparkFFN(dim=128, hidden=480, predictor_dim=64, top_k=38))


def spark_gemma2_2b() -> Decoder:
    """Gemma-2 2B with 8 % active feed-forward units and 256 keys per query.

    Trained for 480k steps on about 2T tokens with Gemma-2's recipe (second-hand).
    """
    attention = SparkAttention(
        dim=2304, num_heads=8, num_kv_heads=4, head_dim=256, predictor_dim=128, top_k=256
    )
    ffn = SparkFFN(dim=2304, hidden=13824, predictor_dim=1024, top_k=1106)
    return gemma2(vocab_size=256000, num_layers=26, attention=attention, ffn=ffn)
