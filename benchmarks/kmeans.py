"""k-means with many centroids against exact Lloyd, and the search among them: seconds and loss.

    python benchmarks/kmeans.py [--large] [--threads N] [--out FILE.md]

The points are Gaussian, 8 numbers each, with weights between 0.1 and 3.1: what VPTQ's vectors look
like to k-means. The peer is this package's own Lloyd with k-means++ seeds and full distances, run
beside it with as many iterations. Exits with 1 if k-means loses more than 2 % to it, or the search
more than 1 %. --large: 7 million points and 65536 centroids instead, where the peer is not run.
--out appends.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import platform
import resource
import time
from collections.abc import Callable

import numpy
import torch

from hf_vq.methods import kmeans_large, panel
from hf_vq.methods.kmeans import kmeans
from hf_vq.methods.lookup import Lookup

SIZES = [(131072, 512), (131072, 1024), (131072, 2048), (131072, 4096), (32768, 4096)]
LARGE = (7_000_000, 65536)
DIM, ITERATIONS = 8, 30
EVALUATED = 131072


def problem(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(n, DIM, generator=generator)
    return points, torch.rand(n, generator=generator) * 3 + 0.1


def distortion(points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor) -> float:
    """Weighted squared error per number, by exact search."""
    index = kmeans_large.nearest(points, centroids)
    gap = (points - centroids[index]).square().mean(1)
    return float((weights * gap).double().sum() / weights.double().sum())


def timed(work) -> tuple[torch.Tensor, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    out = work()
    return out, time.perf_counter() - wall, time.process_time() - cpu


def exact(points: torch.Tensor, weights: torch.Tensor, k: int) -> torch.Tensor:
    # weights that differ within a point are what keeps kmeans() to full distances; 1e-6 of them
    spread = weights[:, None] * torch.linspace(1, 1 + 1e-6, DIM)
    options = {"iterations": ITERATIONS, "init": "kmeans++"}
    return kmeans(points[None], spread[None], k, **options)[0]


def large(points: torch.Tensor, weights: torch.Tensor, k: int) -> torch.Tensor:
    return kmeans_large.kmeans_large(points, weights, k, iterations=ITERATIONS)


def search(k: int, show: Callable[[str], None]) -> float:
    """Rows for the search of the nearest of k centroids; the loss of the sweep with cells."""
    centroids = kmeans_large.kmeans_large(*problem(8 * k), k, iterations=5)
    queries = torch.randn(512 * DIM, 16, generator=torch.Generator().manual_seed(1))
    points = queries.reshape(512, DIM, 16).mT.reshape(-1, DIM).contiguous()
    best, wall, cpu = timed(lambda: kmeans_large.nearest(points, centroids))
    least = float((points - centroids[best]).square().sum())
    show(f"| {k} | every centroid, torch | {wall:.2f} | {cpu:.2f} | 1 | 1 |")
    cells, wall, cpu = timed(lambda: kmeans_large.build_cells(centroids))
    show(f"| {k} | (sorting into {len(cells.centres)} cells) | {wall:.2f} | {cpu:.2f} | | |")

    def row(name: str, index: torch.Tensor, wall: float, cpu: float) -> float:
        ratio = float((points - centroids[index]).square().sum()) / least
        same = float((index == best).double().mean())
        show(f"| {k} | {name} | {wall:.2f} | {cpu:.2f} | {ratio:.5f} | {same:.4f} |")
        return ratio

    for probe in (4, 8, 16, 32):
        work = functools.partial(kmeans_large.candidates, points, centroids, cells, probe, 1)
        found, wall, cpu = timed(work)
        row(f"{probe} cells", found[:, 0], wall, cpu)
    loss, ones = 1.0, torch.ones(16, 1, 1)
    limit = panel._EXACT_LIMIT
    for name, panel._EXACT_LIMIT in (("sweep, every centroid", 1 << 30), ("sweep, cells", k - 1)):
        state = Lookup(
            codebooks=centroids[None, None],
            index=torch.zeros(512, 16, dtype=torch.int32),
            scale=None,
            vectors_per_stripe=16,
            row_mask=torch.ones(len(queries), 1),
            vector_rows=DIM,
        )
        arguments = (queries, torch.zeros_like(queries), 0 * ones, ones, torch.zeros(16, 16))
        panel.solve_panel(state, 0, *arguments)  # compiles, sorts into cells
        _, wall, cpu = timed(functools.partial(panel.solve_panel, state, 0, *arguments))
        loss = row(name, state.index.long().reshape(-1), wall, cpu)
    panel._EXACT_LIMIT = limit
    return loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    large(*problem(4000), 64)  # compiles the loops
    lines = [
        f"k-means, vectors of {DIM}, {ITERATIONS} iterations at most; torch {torch.__version__}, "
        f"numpy {numpy.__version__}, Python {platform.python_version()}, "
        f"{'numba' if kmeans_large._compiled() else 'no numba'}, {args.threads} threads.",
        "",
        "| n | k | method | seconds | CPU seconds | distortion | to exact | times faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    failed = False

    def show(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    print("\n".join(lines))
    for n, k in [] if args.large else SIZES:
        points, weights = problem(n)
        centroids, wall, peer = timed(lambda: exact(points, weights, k))  # noqa: B023
        bar = distortion(points, weights, centroids)
        show(f"| {n} | {k} | exact Lloyd | {wall:.1f} | {peer:.1f} | {bar:.5f} | 1 | 1 |")
        centroids, wall, cpu = timed(lambda: large(points, weights, k))  # noqa: B023
        found = distortion(points, weights, centroids)
        failed |= k > 1024 and found > 1.02 * bar
        show(
            f"| {n} | {k} | cells and neighbours | {wall:.1f} | {cpu:.1f} | {found:.5f} "
            f"| {found / bar:.4f} | {peer / cpu:.1f} |"
        )
    if args.large:
        n, k = LARGE
        points, weights = problem(n)
        centroids, wall, cpu = timed(lambda: large(points, weights, k))
        some = distortion(points[:EVALUATED], weights[:EVALUATED], centroids)
        show(f"| {n} | {k} | exact Lloyd | not measured | | | | |")
        show(
            f"| {n} | {k} | cells and neighbours | {wall:.1f} | {cpu:.1f} | {some:.5f} (of the "
            f"first {EVALUATED}) | not measured | not measured |"
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        show(f"\nPeak memory of the process: {peak:.2f} GiB, the points {n * DIM * 4 / 2**30:.2f}.")
    if not args.large:
        show("\nThe nearest centroid of 8192 points:\n")
        show("| k | search | seconds | CPU seconds | squared error to exact | same centroid |")
        show("|---|---|---|---|---|---|")
        for k in (4096, 65536):
            failed |= search(k, show) > 1.01
    if args.out:
        with args.out.open("a") as file:
            file.write("\n".join(lines) + "\n\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
