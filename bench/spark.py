"""The Spark model beside the dense model of equal parameters: same text, seeds and wall-clock.

    python bench/spark.py FILE --minutes 1.2 --seeds 3

Trains `quickstart` and `spark` in turn, one process each, on the first 90 % of the file, and
measures the last 10 %.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def train(experiment: str, run_dir: Path, arguments: argparse.Namespace, seed: int) -> None:
    options = {
        "minutes": arguments.minutes,
        "data.path": arguments.file,
        "seed": seed,
        "run-dir": run_dir,
        "evaluation.every": 0,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    bestiary("train", experiment, *flags)


def measure(run_dir: Path) -> dict[str, Any]:
    return json.loads(bestiary("eval", str(run_dir), "--json"))


def bestiary(*words: str) -> str:
    command = [sys.executable, "-m", "bestiary", *words]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def steps(run_dir: Path) -> int:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Spark beside the dense model")
    parser.add_argument("file", help="text, such as tinyshakespeare.txt")
    parser.add_argument("--minutes", type=float, default=1.2)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    losses: dict[str, list[float]] = {"quickstart": [], "spark": []}
    with TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for experiment, values in losses.items():
                run_dir = Path(folder, f"{experiment}-{seed}")
                train(experiment, run_dir, arguments, seed)
                result = measure(run_dir)
                values.append(result["nats_per_token"])
                (shares,) = result["nonzero"].values()
                print(
                    f"{experiment:10s} seed {seed}: {steps(run_dir)} steps, {values[-1]:.4f} nats "
                    f"per token, non-zero units {' '.join(f'{share:.1%}' for share in shares)}",
                    flush=True,
                )
    gaps = [a - b for a, b in zip(losses["spark"], losses["quickstart"], strict=True)]
    spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
    print(f"spark - dense = {statistics.mean(gaps):+.4f} +- {spread:.4f} nats per token")


if __name__ == "__main__":
    main()
