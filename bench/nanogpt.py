"""The training step at nanoGPT's CPU shape, beside the same step in eager PyTorch.

    python bench/nanogpt.py                                   # milliseconds of both, and the ratio
    python bench/nanogpt.py --train FILE --iterations 2000    # the PyTorch peer's loss and seconds

The peer is written from the published recipe's numbers: 4 layers, width 128, 4 heads, context 64,
batch 12, no dropout, no biases, tied head, AdamW (0.9, 0.99), weight decay 0.1, clipping at 1.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import freed_memory
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


def bestiary_step() -> Callable[[], object]:
    """One training step of the library at the same shape; rotary in place of learned positions.

    Like a run, it does not wait for its metrics.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bestiary.layers import MLP, Attention, Embedding, GeluTanh, LayerNorm, Repeat
    from bestiary.train.data import Data
    from bestiary.train.experiment import Experiment
    from bestiary.train.mesh import placed
    from bestiary.train.optimizer import Optimizer, Schedule
    from bestiary.train.step import init_state, make_step
    from bestiary.zoo.decoder import Block, Decoder

    norm = LayerNorm(dim=WIDTH, bias=False)
    attention = Attention(dim=WIDTH, num_heads=HEADS, num_kv_heads=HEADS, head_dim=WIDTH // HEADS)
    ffn = MLP(dim=WIDTH, hidden=4 * WIDTH, activation=GeluTanh())
    block = Block(mixer=attention, ffn=ffn, norm=norm)
    experiment = Experiment(
        model=Decoder(
            embedding=Embedding(vocab_size=VOCAB, dim=WIDTH),
            blocks=Repeat(block=block, n=LAYERS, unroll=LAYERS),
            norm=norm,
        ),
        data=Data(length=CONTEXT, batch_size=BATCH),
        optimizer=Optimizer(learning_rate=PEAK, b2=0.99),
        schedule=Schedule(),
        steps=2000,
    )
    mesh = experiment.mesh.build()
    state, step = init_state(experiment, mesh), make_step(experiment, mesh)
    random = np.random.default_rng(0)
    tokens = random.integers(VOCAB, size=(BATCH, CONTEXT + 1), dtype=np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(CONTEXT, dtype=np.int32), (BATCH, CONTEXT)),
        "segment_ids": np.ones((BATCH, CONTEXT), np.int32),
        "weights": np.ones((BATCH, CONTEXT), np.float32),
    }
    batch, total = jax.device_put(batch), jnp.int32(2000)

    def run() -> object:
        nonlocal state
        with placed(mesh, experiment.mesh.table):
            state, metrics = step(state, batch, total)
        return metrics["loss"]

    return run


def torch_step() -> Callable[[], object]:
    torch.manual_seed(1337)
    torch.set_num_threads(2)
    _, step = peer_step()
    inputs, targets = torch.randint(VOCAB, (2, BATCH, CONTEXT))
    return lambda: step(inputs, targets, PEAK)


def worker(pipe: Connection, build: Callable[[], Callable[[], object]]) -> None:
    """Times as many steps as it is told, until it is told none."""
    run = build()
    while steps := pipe.recv():
        start = time.perf_counter()
        for _ in range(steps):
            result = run()
        float(result)  # type: ignore[arg-type]  # waits
        pipe.send((time.perf_counter() - start) / steps * 1e3)


def compare(rounds: int, steps: int) -> None:
    """Milliseconds per step, the programs taking turns in processes of their own.

    Both keep freed memory (glibc would hand it back to the kernel after every step).
    """
    os.environ |= freed_memory.KEEP
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    workers = []
    for name, build in (("pytorch", torch_step), ("bestiary", bestiary_step)):
        pipes[name], theirs = context.Pipe()
        workers.append(context.Process(target=worker, args=(theirs, build)))
        workers[-1].start()
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for turn in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(steps)
            milliseconds = pipe.recv()
            if turn:  # the first is for compilation
                times[name].append(milliseconds)
    for pipe, process in zip(pipes.values(), workers, strict=True):
        pipe.send(0)
        process.join()
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:10s} {median:8.2f} ms per step (best {min(times[name]):.2f})")
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
    if arguments.train:
        torch.manual_seed(1337)
        torch.set_num_threads(2)
        train(arguments.train, arguments.iterations)
    else:
        compare(arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
