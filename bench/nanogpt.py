"""The training step at nanoGPT's CPU shape, beside the same step in eager PyTorch.

    python bench/nanogpt.py                                   # milliseconds of both, and the ratio
    python bench/nanogpt.py --train FILE --iterations 2000    # the PyTorch peer's loss and seconds

The peer is written from the published recipe's numbers: 4 layers, width 128, 4 heads, context 64,
batch 12, no dropout, no biases, tied head, AdamW (0.9, 0.99), weight decay 0.1, clipping at 1.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, WIDTH, HEADS, CONTEXT, BATCH, VOCAB = 4, 128, 4, 64, 12, 65
PEAK, FLOOR, WARMUP = 1e-3, 1e-4, 100


class Block(nn.Module):
    """Pre-norm causal attention and GELU feed-forward."""

    def __init__(self):
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm_2 = nn.LayerNorm(WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Peer(nn.Module):
    """tokens [batch, length] -> logits [batch, length, vocab]."""

    def __init__(self, vocab: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def cross_entropy(model: Peer, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def peer_step(vocab: int = VOCAB) -> tuple[Peer, Callable[[Tensor, Tensor, float], float]]:
    """The peer and its step `(inputs, targets, learning_rate) -> loss`."""
    model = Peer(vocab)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99))

    def step(inputs: Tensor, targets: Tensor, learning_rate: float) -> float:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate
        loss = cross_entropy(model, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return model, step


# WIRE IN HERE: the same shape, optimiser and batch through the library's own training step.
def bestiary_step() -> Callable[[], object]:
    """A function that runs one bestiary training step and waits for its result."""
    raise NotImplementedError("the bestiary training step is not wired into this bench yet")


def compare(rounds: int, steps: int) -> None:
    _, step = peer_step()
    inputs, targets = torch.randint(VOCAB, (2, BATCH, CONTEXT))
    programs: dict[str, Callable[[], object]] = {"pytorch": lambda: step(inputs, targets, PEAK)}
    try:
        programs["bestiary"] = bestiary_step()
    except NotImplementedError as reason:
        print(reason)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for run in programs.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, run in programs.items():
            start = time.perf_counter()
            for _ in range(steps):
                run()
            times[name].append((time.perf_counter() - start) / steps * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:10s} {median:8.2f} ms per step (best {min(times[name]):.2f})")
    if "bestiary" in medians:
        print(f"bestiary / pytorch = {medians['bestiary'] / medians['pytorch']:.3f}")


def learning_rate(iteration: int, iterations: int) -> float:
    if iteration < WARMUP:
        return PEAK * (iteration + 1) / (WARMUP + 1)
    progress = (iteration - WARMUP) / max(1, iterations - WARMUP)
    return FLOOR + 0.5 * (PEAK - FLOOR) * (1 + math.cos(math.pi * progress))


def train(file: Path, iterations: int) -> None:
    text = file.read_text(encoding="utf-8")
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    data = torch.tensor([letters[letter] for letter in text])
    training, held_out = data.tensor_split([int(0.9 * len(data))])
    model, step = peer_step(len(letters))
    start = time.perf_counter()
    for i in range(iterations):
        offsets = torch.randint(len(training) - CONTEXT, (BATCH, 1)) + torch.arange(CONTEXT + 1)
        windows = training[offsets]
        loss = step(windows[:, :-1], windows[:, 1:], learning_rate(i, iterations))
        if i % 100 == 0:
            print(f"iteration {i} loss {loss:.3f}", flush=True)
    print(f"{time.perf_counter() - start:.1f} s for {iterations} iterations")
    windows = held_out.unfold(0, CONTEXT + 1, CONTEXT)
    with torch.no_grad():
        losses = [cross_entropy(model, w[:, :-1], w[:, 1:]) * len(w) for w in windows.split(256)]
    loss = torch.stack(losses).sum().item() / len(windows)
    print(f"validation loss {loss:.4f} nats per character")


def main() -> None:
    parser = argparse.ArgumentParser(description="nanoGPT's CPU recipe beside bestiary")
    parser.add_argument("--train", type=Path, metavar="FILE", help="train the peer on this text")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(1337)
    torch.set_num_threads(2)
    if arguments.train:
        train(arguments.train, arguments.iterations)
    else:
        compare(arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
