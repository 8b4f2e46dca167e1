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
import pathlib
import platform
import resource
import time

import numpy
import torch

from hf_vq.methods import kmeans_large
from hf_vq.methods.kmeans import kmeans

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


def search_rows(centroids: torch.Tensor, queries: torch.Tensor) -> tuple[list[str], float]:
    """Rows for the search of one nearest centroid, and the loss of the setting that is used."""
    best, wall, cpu = timed(lambda: kmeans_large.nearest(queries, centroids))
    least = (queries - centroids[best]).square().sum()
    rows = [f"| every centroid | {wall:.2f} | {cpu:.2f} | 1 | 1 |"]
    cells = kmeans_large.build_cells(centroids)
    used = float("inf")
    for probe in (4, 8, 16, 32):
        found, wall, cpu = timed(
            lambda probe=probe: kmeans_large.candidates(queries, centroids, cells, probe, 1)[:, 0]
        )
        ratio = float((queries - centroids[found]).square().sum() / least)
        same = float((found == best).double().mean())
        used = ratio if probe == kmeans_large.SEARCHED else used
        name = f"{probe} of {len(cells.centres)} cells"
        rows.append(f"| {name} | {wall:.2f} | {cpu:.2f} | {ratio:.5f} | {same:.4f} |")
    return rows, used


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
    k, queries = len(centroids), torch.randn(20000, DIM, generator=torch.Generator().manual_seed(1))
    show(f"\nThe nearest of {k} centroids for {len(queries)} points:\n")
    show("| search | seconds | CPU seconds | squared error to exact | same centroid |")
    show("|---|---|---|---|---|")
    rows, used = search_rows(centroids, queries)
    for row in rows:
        show(row)
    failed |= used > 1.01
    if args.out:
        with args.out.open("a") as file:
            file.write("\n".join(lines) + "\n\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
