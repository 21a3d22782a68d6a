"""A tensor and its compact form: knows nothing of autograd, Lightning or graphs."""

from lightning_tinykg.codecs import ops  # noqa: F401  # registers the operators
from lightning_tinykg.codecs.affine import AffineCode, dequantize, quantize
from lightning_tinykg.codecs.lossless import Code
from lightning_tinykg.codecs.packing import pack_codes, unpack_codes

__all__ = ["AffineCode", "Code", "dequantize", "pack_codes", "quantize", "unpack_codes"]
