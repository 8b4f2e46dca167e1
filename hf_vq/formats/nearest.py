"""Other codes for a packed matrix: those whose centroids are nearest to given weights.

What training moves are codebooks; this moves the codes. `target` is where an optimizer would have
the weights go, and a code is changed when another centroid is nearer to its target than its own.
Only the changes that gain most are made (`most`), as PV-Tuning (arXiv 2405.14852, section 3.3)
does: every change was found as if it were the only one, and many at once do not add up.

Tensors and specs are the wide ones of `hf_vq.formats.trainable`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from hf_vq_kernels.cvxq_reference import expand_location, expand_scales
from hf_vq_kernels.levels import level_table
from hf_vq_kernels.reference import expand_codebooks
from hf_vq_kernels.reference import expand_scales as expand_row_scales
from torch import Tensor

from hf_vq.formats import cvxq, gptvq, vptq
from hf_vq.formats.bitstream import pack_bits
from hf_vq.formats.cvxq import CVXQSpec
from hf_vq.formats.gptvq import GPTVQSpec
from hf_vq.formats.vptq import VPTQSpec

Tensors = Mapping[str, Tensor]

# Values of one chunk of distances.
_CHUNK = 1 << 22
_TINY = 1e-30


def nearest_gptvq(
    target: Tensor, tensors: Tensors, spec: GPTVQSpec, most: float
) -> tuple[dict[str, Tensor], int]:
    """The tensors whose values have changed, and the number of codes that are others now.

    target: (out_features, in_features), float32. most: share of all codes, 0 to 1.
    """
    codes = gptvq.unpack(tensors, spec)
    rows, d = spec.out_features, spec.vector_dim
    beyond = spec.num_vectors * d - spec.in_features
    vectors = F.pad(target, (0, beyond)).view(rows, spec.num_vectors, d)
    first = torch.arange(spec.num_vectors, device=target.device) * d
    scales = torch.ones(rows, spec.num_vectors, device=target.device)
    if spec.scale_block:
        scales = expand_row_scales(
            tensors["scale_codes"],
            tensors["scale_grid"],
            spec.num_scale_blocks,
            spec.scale_domain == "log",
        )[:, first // spec.scale_block]
    entries = tensors["codebook_factors" if spec.svd_rank else "codebooks"]
    basis = tensors.get("codebook_basis")
    books = expand_codebooks(entries, None, basis, spec.num_centroids, d)
    group = torch.arange(rows, device=target.device)[:, None] // spec.group_rows
    book = (first // spec.group_columns) * spec.num_row_groups + group
    books = books.flatten(0, 1)
    vectors = vectors / _nonzero(scales)[..., None]
    # columns that the matrix has not wish for what they are
    vectors[:, -1, d - beyond :] = books[book[:, -1], codes.indices[:, -1], d - beyond :]
    found, gains = closer(vectors.flatten(0, 1), books, book.flatten(), codes.indices.flatten())
    changed = best(gains * scales.flatten().square(), most)
    indices = torch.where(changed, found, codes.indices.flatten()).view(rows, -1)
    return {"indices": pack_bits(indices, spec.index_bits)}, int(changed.sum())


def nearest_vptq(
    target: Tensor, tensors: Tensors, spec: VPTQSpec, most: float
) -> tuple[dict[str, Tensor], int]:
    """As `nearest_gptvq`. Of two codes that add up, the one that gains more is changed."""
    codes = vptq.unpack(tensors, spec)
    weights = torch.ones(spec.in_features, device=target.device)  # of a column's error
    if codes.scale is not None and codes.bias is not None:
        if spec.norm == "rows":  # differ within a vector: an approximation
            target = (target - codes.bias[:, None]) / _nonzero(codes.scale)[:, None]
        else:
            target = (target - codes.bias) / _nonzero(codes.scale)
            weights = codes.scale
    if codes.perm is not None:
        target, weights = target[:, codes.perm], weights[codes.perm]
    outliers, groups = spec.outlier_columns, spec.num_groups
    columns = weights[outliers:].view(groups, 1, -1).expand(codes.indices.shape).flatten().square()
    vectors = _columns(target[:, outliers:], spec.vector_dim, spec.num_row_blocks)
    # (row blocks, v, groups, columns) -> (groups, row blocks, columns, v)
    vectors = vectors.unflatten(2, (groups, -1)).permute(2, 0, 3, 1)
    book = torch.arange(groups, device=target.device).view(-1, 1, 1).expand(codes.indices.shape)
    now = codes.centroids[book[:, -1], codes.indices[:, -1]]
    if codes.res_indices is not None and codes.res_centroids is not None:
        now = now + codes.res_centroids[book[:, -1], codes.res_indices[:, -1]]
    vectors = _fixed(vectors, 1, spec.out_features, now)
    vectors, book, main = vectors.flatten(0, 2), book.flatten(), codes.indices.flatten()
    if codes.res_indices is None or codes.res_centroids is None:
        found, gains = closer(vectors, codes.centroids, book, main)
        residual = None
    else:
        residual = codes.res_indices.flatten()
        rest = vectors - codes.centroids[book, main]
        other, gains = closer(rest, codes.res_centroids, book, residual)
        rest = vectors - codes.res_centroids[book, residual]
        found, more = closer(rest, codes.centroids, book, main)
        found = torch.where(more > gains, found, main)
        residual = torch.where(more > gains, residual, other)
        gains = torch.maximum(gains, more)
    gains = gains * columns
    outer = outer_gains = None
    if codes.outlier_indices is not None and codes.outlier_centroids is not None and outliers:
        v = spec.outlier_vector_dim
        vectors = _columns(target[:, :outliers], v, spec.num_outlier_row_blocks).permute(0, 2, 1)
        now = codes.outlier_centroids[codes.outlier_indices[-1]]
        vectors = _fixed(vectors, 0, spec.out_features, now)
        old = codes.outlier_indices.flatten()
        outer, outer_gains = closer(
            vectors.flatten(0, 1),
            codes.outlier_centroids[None],
            torch.zeros_like(old),
            old,
        )
        wide = weights[:outliers].expand(codes.outlier_indices.shape).flatten().square()
        gains = torch.cat([gains, outer_gains * wide])
    changed = best(gains, most)
    mine = changed[: len(main)]
    codes.indices = torch.where(mine, found, main).view(codes.indices.shape)
    if residual is not None and codes.res_indices is not None:
        shape = codes.res_indices.shape
        codes.res_indices = torch.where(mine, residual, codes.res_indices.flatten()).view(shape)
    out = {"indices"}
    if outer is not None and codes.outlier_indices is not None:
        kept = torch.where(changed[len(main) :], outer, codes.outlier_indices.flatten())
        codes.outlier_indices = kept.view(codes.outlier_indices.shape)
        out.add("outlier_indices")
    packed = vptq.pack(codes, spec)
    return {name: packed[name] for name in out}, int(changed.sum())


def nearest_cvxq(
    target: Tensor, tensors: Tensors, spec: CVXQSpec, most: float
) -> tuple[dict[str, Tensor], int]:
    """As `nearest_gptvq`; depths stay."""
    codes = cvxq.unpack(tensors, spec)
    if codes.row_perm is not None:
        target = target[codes.row_perm]
    beyond = spec.num_clusters * spec.group_rows - spec.out_features
    values = _columns(target, spec.group_rows, spec.num_clusters).transpose(1, 2)
    scales = expand_scales(tensors["scales"], None)[..., None]
    if "location" in tensors:
        values = values - expand_location(tensors["location"], scales[..., 0])[..., None]
    values = values / _nonzero(scales)
    table = level_table(spec.levels).to(target.device)
    found = codes.codes.clone()
    for depth in range(1, cvxq.MAX_DEPTH + 1):
        mine = codes.depths == depth
        levels, order = table[1 << depth : 2 << depth].sort()
        borders = (levels[1:] + levels[:-1]) / 2
        found[mine] = order[torch.bucketize(values[mine].contiguous(), borders)]
    if beyond:
        found[-1, :, -beyond:] = 0
    first = 1 << codes.depths.long()[..., None]
    gains = (values - table[first + codes.codes]).square()
    gains = (gains - (values - table[first + found]).square()) * scales.square()
    gains = torch.where(found == codes.codes, 0, gains)
    changed = best(gains.flatten(), most).view(gains.shape)
    codes.codes = torch.where(changed, found, codes.codes)
    return {"words": cvxq.pack_words(codes, spec)}, int(changed.sum())


def closer(vectors: Tensor, books: Tensor, book: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroids (n,), and by how much nearer than `codes` in squared distance (n,), >= 0.

    vectors: (n, d). books: (B, k, d). book, codes: int64 (n,), which one a vector uses, and how.
    A vector that is nearer to its centroid than half the way to that one's neighbour has none
    nearer, so most are not looked at.
    """
    now = (vectors - books[book, codes]).square().sum(-1)
    found, gains = codes.clone(), torch.zeros_like(now)
    looked_at = (now > _half_way(books)[book, codes]).nonzero().flatten()
    k, d = books.shape[1:]
    for some in looked_at.split(max(1, _CHUNK // (k * d))):
        distances = (vectors[some, None] - books[book[some]]).square().sum(-1)
        least, at = distances.min(-1)
        gain = now[some] - least
        found[some] = torch.where(gain > 0, at, codes[some])
        gains[some] = gain.clamp_min(0)
    return found, gains


def _half_way(books: Tensor) -> Tensor:
    """Squared distance (B, k) of every centroid to half the way to the nearest other one."""
    count, k, _ = books.shape
    together, rows = max(1, _CHUNK // (k * k)), max(1, min(k, _CHUNK // k))
    parts = []
    for some in books.split(together):
        for start in range(0, k, rows):
            few = some[:, start : start + rows]
            distances = torch.cdist(few, some, compute_mode="donot_use_mm_for_euclid_dist")
            at = torch.arange(few.shape[1], device=books.device)
            distances[:, at, start + at] = torch.inf
            parts.append(distances.amin(-1))
    # several books at a time, or several parts of one
    return (torch.cat([part.flatten() for part in parts]).view(count, k) / 2).square()


def best(gains: Tensor, most: float) -> Tensor:
    """Which of (n,) gains are positive and among the best `most` * n."""
    changed = gains > 0
    count = int(most * len(gains))
    if int(changed.sum()) > count:
        keep = gains.topk(count).indices
        changed = torch.zeros_like(changed)
        changed[keep] = True
    return changed


def _columns(matrix: Tensor, dim: int, blocks: int) -> Tensor:
    """(rows, columns) -> (blocks, dim, columns), with zero rows to fill up."""
    return F.pad(matrix, (0, 0, 0, blocks * dim - len(matrix))).view(blocks, dim, -1)


def _fixed(vectors: Tensor, axis: int, rows: int, now: Tensor) -> Tensor:
    """Rows that the matrix has not wish for what they are: the ends of the last block's vectors.

    vectors: (..., v), whose `axis` counts blocks of v rows. now: what the last block decodes to.
    """
    blocks, v = vectors.shape[axis], vectors.shape[-1]
    last = rows - (blocks - 1) * v
    ends = torch.cat([vectors.select(axis, -1)[..., :last], now[..., last:]], -1)
    return torch.cat([vectors.narrow(axis, 0, blocks - 1), ends.unsqueeze(axis)], axis)


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales.abs() < _TINY, 1, scales)
