"""Operators of hf_vq. Importing this package registers `torch.ops.hf_vq.*`; it needs torch alone.

bits.py: the bit stream every format shares; ops.py (gptvq), vptq_ops.py and cvxq_ops.py: the
operators (schema, default implementation, shape inference, gradients); embedding_ops.py: rows of
packed tables; reference.py and those of the others: what they compute, written to be read;
dispatch.py: which backend computes, and why; lookup.py and autograd.py: what the operators have in
common; levels.py: the numbers that CVXQ's codes stand for; layouts.py: what is kept beside packed
tensors at run time.
"""

from hf_vq_kernels import layouts
from hf_vq_kernels.bits import unpack_bits
from hf_vq_kernels.cvxq_ops import cvxq_dequantize, cvxq_linear
from hf_vq_kernels.dispatch import explain, use_backend
from hf_vq_kernels.embedding_ops import cvxq_embedding, gptvq_embedding, vptq_embedding
from hf_vq_kernels.ops import gptvq_dequantize, gptvq_linear
from hf_vq_kernels.vptq_ops import vptq_dequantize, vptq_linear

__all__ = [
    "cvxq_dequantize",
    "cvxq_embedding",
    "cvxq_linear",
    "explain",
    "gptvq_dequantize",
    "gptvq_embedding",
    "gptvq_linear",
    "layouts",
    "unpack_bits",
    "use_backend",
    "vptq_dequantize",
    "vptq_embedding",
    "vptq_linear",
]
