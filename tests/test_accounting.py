"""One accounting for all models: by hand for a small one, and the table in the documentation."""

from dataclasses import replace
from pathlib import Path

import pytest

from bestiary.eval.accounting import account
from bestiary.eval.show import figures_table
from bestiary.layers import H2O, KIVI, Attention, CachePolicy, Full, MoBA, SinksWindow, SnapKV
from bestiary.layers.base import params_of
from bestiary.train.optimizer import Optimizer
from bestiary.zoo.llama import llama, swiglu
from bestiary.zoo.mixtures import olmoe, olmoe_ffn

DIM, HEADS, HEAD_DIM, HIDDEN, VOCAB, LAYERS, LENGTH = 16, 4, 6, 40, 50, 3, 10
ATTENTION = Attention(dim=DIM, num_heads=HEADS, num_kv_heads=2, head_dim=HEAD_DIM)
MODEL = llama(vocab_size=VOCAB, num_layers=LAYERS, attention=ATTENTION, ffn=swiglu(DIM, HIDDEN))

ATTENTION_MATRICES = 2 * DIM * HEADS * HEAD_DIM + 2 * DIM * 2 * HEAD_DIM
MATRICES = LAYERS * (ATTENTION_MATRICES + 3 * DIM * HIDDEN) + DIM * VOCAB
PER_KEY = LAYERS * 4 * HEADS * HEAD_DIM


def test_a_dense_model_by_hand() -> None:
    a = account(MODEL, LENGTH)
    assert a.params_total == a.params_active == MATRICES + DIM * VOCAB + (2 * LAYERS + 1) * DIM
    assert a.forward_flops_total == 2 * MATRICES + PER_KEY * LENGTH
    assert a.forward_flops_active == 2 * MATRICES + PER_KEY * (LENGTH + 1) / 2
    assert a.training_flops_total == 3 * a.forward_flops_total
    assert a.decode_flops_active == pytest.approx(2 * MATRICES + PER_KEY * LENGTH)
    # keys, values, positions and segments of each layer, and how many tokens were seen
    assert a.cache_bytes == 4 * (LAYERS * LENGTH * (2 * 2 * HEAD_DIM + 2) + 1)
    assert a.optimizer_bytes == 8 * a.params_total + 4  # and a count


@pytest.mark.parametrize(
    "policy, kept",
    [
        (Full(), LENGTH),
        (KIVI(group_size=2, residual=32), LENGTH),
        (SinksWindow(sinks=1, window=4), 5),
        (H2O(heavy=2, recent=2), 5),  # it evicts behind the token
        (SnapKV(capacity=4, window=2, room=3), 8),
    ],
)
def test_decoding_multiplies_with_the_keys_that_a_policy_keeps(
    policy: CachePolicy, kept: int
) -> None:
    attention = replace(ATTENTION, cache=policy)
    model = llama(vocab_size=VOCAB, num_layers=LAYERS, attention=attention, ffn=swiglu(DIM, HIDDEN))
    a, full = account(model, LENGTH), account(MODEL, LENGTH)
    assert a.decode_flops_active == pytest.approx(2 * MATRICES + PER_KEY * kept)
    assert a.forward_flops_active == full.forward_flops_active
    cache = sum(p.nbytes for p in params_of(model.cache_spec(1, LENGTH)))
    assert a.cache_bytes == cache
    assert a.decode_bytes_active - full.decode_bytes_active == cache - full.cache_bytes


def test_the_optimiser_decides_on_its_bytes() -> None:
    adamw, lion = (account(MODEL, 5, Optimizer(name=n)).optimizer_bytes for n in ("adamw", "lion"))
    assert adamw == pytest.approx(2 * lion, rel=1e-3)


def test_training_counts_what_only_training_predicts() -> None:
    plain, further = account(MODEL, LENGTH), account(MODEL.with_mtp(), LENGTH)
    assert further.forward_flops_total == plain.forward_flops_total
    block = 2 * (ATTENTION_MATRICES + 3 * DIM * HIDDEN) + PER_KEY * LENGTH / LAYERS
    added = 2 * 2 * DIM * DIM + block + 2 * DIM * VOCAB
    assert further.training_flops_total == plain.training_flops_total + 3 * added


def test_a_mixture_costs_what_a_token_uses() -> None:
    few, many = (olmoe(2, DIM, 2, olmoe_ffn(DIM, n, 2, swiglu(DIM, 8))) for n in (4, 64))
    a, b = account(few, LENGTH), account(many, LENGTH)
    router = 2 * 2 * DIM * 60  # only the router grows
    assert b.forward_flops_total == a.forward_flops_total + router
    assert b.forward_flops_active == a.forward_flops_active + router
    experts = 2 * 3 * DIM * 8 * 60
    assert b.params_total == a.params_total + experts + router / 2


def test_of_a_cache_the_chosen_blocks_are_read() -> None:
    """What grows with the length is where keys stand, and the mean key of every block."""
    heads = {"num_heads": HEADS, "num_kv_heads": 2, "head_dim": HEAD_DIM}
    moba = MoBA(dim=DIM, **heads, block_size=4, top_k=2)
    model = llama(vocab_size=VOCAB, num_layers=LAYERS, attention=moba, ffn=swiglu(DIM, HIDDEN))
    short, long = account(model, 100), account(model, 200)
    index, means = 8 * 100, (4 * 2 * HEAD_DIM + 8) * 25
    added = long.decode_bytes_active - short.decode_bytes_active
    assert added == pytest.approx(LAYERS * (index + means))
    keys = LAYERS * 100 * 2 * 2 * HEAD_DIM * 4
    assert long.cache_bytes - short.cache_bytes == pytest.approx(added + keys)


def test_the_documentation_shows_every_model() -> None:
    """`bestiary list --figures` renews docs/models.md."""
    text = Path(__file__).parent.parent.joinpath("docs", "models.md").read_text()
    assert text.endswith(figures_table(4096) + "\n")
