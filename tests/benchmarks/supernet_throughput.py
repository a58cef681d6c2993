"""What elastic training costs: a step on views of the supernet against plain subnetworks.

Both sides train the same archs on the same batch, forward and backward, in one process and in
turn. The plain side holds ready-made `Subnet`s of their own weights, with gradients zeroed; the
supernet side pays for making the views as well. Prints medians and the ratio per arch.

    python -m tests.benchmarks.supernet_throughput [--preset decoder-small] [--threads 1] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hw_profiles.process import prepare_process
from searchspace.arch import Arch
from searchspace.space import SearchSpace
from searchspace.subnet import Subnet
from searchspace.supernet import Supernet

VOCAB = 1024


def loss_of(model: Subnet, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def archs_of(space: SearchSpace, num_random: int) -> dict[str, list[Arch]]:
    """Return what is trained in one step: a sandwich, and single archs for comparison."""
    rng = np.random.default_rng(0)
    randoms = [space.sample(rng) for _ in range(num_random)]
    half = space.uniform(d_model=sorted(space.d_model)[len(space.d_model) // 2])
    return {
        "sandwich": [space.largest(), space.smallest(), randoms[0]],
        "largest": [space.largest()],
        "smaller width": [half],
        **{f"random {i}": [arch] for i, arch in enumerate(randoms)},
    }


def step_times(step: Callable[[], None]) -> float:
    """Return the seconds one step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(
    supernet: Supernet, archs: list[Arch], batch: tuple[Tensor, Tensor], rounds: int
) -> dict[str, float]:
    """Time both sides in turn; return medians in ms and the median of the ratios."""
    plain = [supernet.extract(arch).requires_grad_(True) for arch in archs]

    def elastic_step() -> None:
        supernet.start_step()
        for arch in archs:
            loss_of(supernet.view(arch, train=True), *batch).backward()
        supernet.publish_gradients()

    def plain_step() -> None:
        for model in plain:
            model.zero_grad(set_to_none=False)
        for model in plain:
            loss_of(model, *batch).backward()

    plain_step(), elastic_step()
    pairs = [(step_times(elastic_step), step_times(plain_step)) for _ in range(rounds)]
    return {
        "elastic_ms": 1e3 * statistics.median(e for e, _ in pairs),
        "plain_ms": 1e3 * statistics.median(p for _, p in pairs),
        "ratio": statistics.median(e / p for e, p in pairs),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="decoder-small")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--random", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="grad and param do not obey")
    prepare_process(options.threads)
    space = SearchSpace.load(options.preset, VOCAB)
    generator = torch.Generator().manual_seed(0)
    supernet = Supernet(space, generator)
    tokens = torch.randint(0, VOCAB, (options.batch_size, options.tokens + 1), generator=generator)
    batch = tokens[:, :-1], tokens[:, 1:]
    rows = {
        name: compare(supernet, archs, batch, options.rounds)
        for name, archs in archs_of(space, options.random).items()
    }
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'archs':<16}{'elastic ms':>12}{'plain ms':>12}{'ratio':>8}")
    for name, row in rows.items():
        print(f"{name:<16}{row['elastic_ms']:>12.1f}{row['plain_ms']:>12.1f}{row['ratio']:>8.3f}")


if __name__ == "__main__":
    main()
