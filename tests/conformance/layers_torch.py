"""PyTorch's own layers as cases: its module database, and what that lacks or has in miniature only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from checking import Case
from layers_data import IN, OUT, Builder, positive, step, types, x
from layers_graph import Call
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

SAMPLES = 12
"""Samples of a module at the most; spread evenly over those of the database, which has up to 857 of one module."""

DOUBLE = ("FractionalMaxPool2d", "FractionalMaxPool3d")
"""Modules whose samples the database has in float64 only."""

_CONTAINER = "a container: what it contains are cases"

LEFT_OUT = {
    "Module": "the base of all others",
    "Container": _CONTAINER,
    "ModuleDict": _CONTAINER,
    "ModuleList": _CONTAINER,
    "ParameterDict": _CONTAINER,
    "ParameterList": _CONTAINER,
    "RNNBase": "the base of RNN, GRU and LSTM, which are cases",
    "RNNCellBase": "the base of RNNCell, GRUCell and LSTMCell, which are cases",
    "LinearCrossEntropyOptions": "no module: the options of LinearCrossEntropyLoss",
    "SyncBatchNorm": "needs CUDA and a process group",
}
"""Public names that are no case, and why."""


@cache
def database() -> dict[str, Any]:
    """The modules of PyTorch's own database, by class name."""
    from torch.testing._internal.common_modules import module_db

    return {info.module_cls.__name__: info for info in module_db}


def samples(name: str) -> Iterator[Case]:
    """A module's samples, in training and, where that differs, in evaluation."""
    info = database()[name]
    dtype = torch.float64 if name in DOUBLE else torch.float32
    for training in (True, False) if info.train_and_eval_differ else (True,):
        torch.manual_seed(0)
        given = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
        for number in range(0, len(given), -(-len(given) // SAMPLES)):
            sample = given[number]
            if sample.forward_input is None:
                continue
            torch.manual_seed(number)  # not after whatever ran since the last sample
            module = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            module.to(dtype).train(training)
            args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
            if info.is_lazy:
                with torch.no_grad():
                    module(*args, **kwargs)
            case = step(module, *args, **kwargs)
            if case.leaves:
                yield replace(case, name=f"{name}, sample {number}{'' if training else ', evaluated'}")


# -- what the database lacks, or has in miniature only -----------------------------------------------------------------


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def line() -> Tensor:
    return image(4, IN, 24)


def plane() -> Tensor:
    return image(4, IN, 8, 8)


def space() -> Tensor:
    return image(2, IN, 4, 4, 4)


def words() -> Tensor:
    return image(4, 10, OUT)


def lazy(module: nn.Module, *args: Any) -> Case:
    """A module that takes its sizes from its first inputs."""
    with torch.no_grad():
        module(*args)
    return step(module, *args)


def unpooled(pool: nn.Module, unpool: nn.Module, value: Tensor) -> Case:
    return step(nn.ModuleList([pool, unpool]), value, run=lambda both, value: both[1](*both[0](value)))


def causal(module: nn.Module) -> Case:
    mask = nn.Transformer.generate_square_subsequent_mask(10)
    return step(module, words(), src_mask=mask, is_causal=True)


def attention(need_weights: bool, **options: Any) -> Case:
    module = nn.MultiheadAttention(OUT, 4, batch_first=True, **options)
    return step(module, words(), words(), words(), need_weights=need_weights)


def packed() -> Case:
    lengths = torch.tensor([10, 7, 5, 2])

    def run(module: nn.Module, value: Tensor) -> Any:
        return module(nn.utils.rnn.pack_padded_sequence(value, lengths, batch_first=True))

    return step(nn.LSTM(OUT, OUT, batch_first=True, bidirectional=True), words(), run=run)


def checkpointed() -> Case:
    module = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Dropout(0.2), nn.Linear(OUT, IN))
    return step(module, x(), run=lambda module, value: checkpoint(module, value, use_reentrant=False))


def alone(kind: type[nn.Module]) -> Builder:
    return lambda: step(kind(), x(OUT))


ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Softplus,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.GLU, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Dropout, nn.AlphaDropout,
    nn.FeatureAlphaDropout, nn.Identity, nn.Flatten,
)  # fmt: skip
"""Modules that make features of features, and need no arguments."""

LAYERS: dict[str, Builder] = {
    **{kind.__name__: alone(kind) for kind in ACTIVATIONS},
    "Linear": lambda: step(nn.Linear(IN, OUT), x()),
    "Bilinear": lambda: step(nn.Bilinear(IN, IN, OUT), x(), x()),
    "LazyLinear": lambda: lazy(nn.LazyLinear(OUT), x()),
    "Embedding": lambda: step(nn.Embedding(40, OUT), types(40)),
    "Embedding: normalized, sparse": lambda: step(nn.Embedding(40, OUT, sparse=True, padding_idx=0), types(40)),
    "EmbeddingBag": lambda: step(nn.EmbeddingBag(40, OUT), types(40).view(30, 4)),
    "EmbeddingBag: weights": lambda: step(
        nn.EmbeddingBag(40, OUT, mode="sum"), types(40).view(30, 4), per_sample_weights=positive(30, 4)
    ),
    "EmbeddingBag: max": lambda: step(nn.EmbeddingBag(40, OUT, mode="max"), types(40), torch.arange(0, 120, 4)),
    "Conv1d": lambda: step(nn.Conv1d(IN, OUT, 3, padding=1), line()),
    "Conv2d": lambda: step(nn.Conv2d(IN, OUT, 3, padding=1, groups=4), plane()),
    "Conv2d: channels last": lambda: step(
        nn.Conv2d(IN, OUT, 3, stride=2), plane().detach().to(memory_format=torch.channels_last).requires_grad_()
    ),
    "Conv3d": lambda: step(nn.Conv3d(IN, OUT, 3, padding=1, dilation=1), space()),
    "ConvTranspose1d": lambda: step(nn.ConvTranspose1d(IN, OUT, 3, stride=2), line()),
    "ConvTranspose2d": lambda: step(nn.ConvTranspose2d(IN, OUT, 3, stride=2), plane()),
    "ConvTranspose3d": lambda: step(nn.ConvTranspose3d(IN, 8, 2, stride=2), space()),
    "BatchNorm1d": lambda: step(nn.BatchNorm1d(IN), line()),
    "BatchNorm2d": lambda: step(nn.BatchNorm2d(IN), plane()),
    "BatchNorm2d: evaluated": lambda: step(nn.BatchNorm2d(IN).eval(), plane()),
    "BatchNorm3d": lambda: step(nn.BatchNorm3d(IN), space()),
    "InstanceNorm1d": lambda: step(nn.InstanceNorm1d(IN, affine=True), line()),
    "InstanceNorm2d": lambda: step(nn.InstanceNorm2d(IN, affine=True), plane()),
    "InstanceNorm3d": lambda: step(nn.InstanceNorm3d(IN, affine=True), space()),
    "LazyBatchNorm1d": lambda: lazy(nn.LazyBatchNorm1d(), line()),
    "LazyBatchNorm2d": lambda: lazy(nn.LazyBatchNorm2d(), plane()),
    "LazyBatchNorm3d": lambda: lazy(nn.LazyBatchNorm3d(), space()),
    "LazyInstanceNorm1d": lambda: lazy(nn.LazyInstanceNorm1d(affine=True), line()),
    "LazyInstanceNorm2d": lambda: lazy(nn.LazyInstanceNorm2d(affine=True), plane()),
    "LazyInstanceNorm3d": lambda: lazy(nn.LazyInstanceNorm3d(affine=True), space()),
    "GroupNorm": lambda: step(nn.GroupNorm(4, IN), plane()),
    "LayerNorm": lambda: step(nn.LayerNorm(OUT), words()),
    "RMSNorm": lambda: step(nn.RMSNorm(OUT), words()),
    # divides the value, whose square is in the divisor: both are the same rounding, so their product is biased
    "LocalResponseNorm": lambda: step(nn.LocalResponseNorm(4), plane(), z_test=False),
    "CrossMapLRN2d": lambda: step(nn.CrossMapLRN2d(4), plane()),
    "Dropout1d": lambda: step(nn.Dropout1d(), line()),
    "Dropout2d": lambda: step(nn.Dropout2d(), plane()),
    "Dropout3d": lambda: step(nn.Dropout3d(), space()),
    "RNN": lambda: step(nn.RNN(OUT, OUT, 2, dropout=0.2, batch_first=True), words()),
    "GRU": lambda: step(nn.GRU(OUT, OUT, 2, dropout=0.2, batch_first=True), words()),
    "LSTM": lambda: step(nn.LSTM(OUT, OUT, 2, dropout=0.2, batch_first=True), words()),
    "LSTM: projected, both ways": lambda: step(nn.LSTM(OUT, OUT, proj_size=8, bidirectional=True), words()),
    "LSTM: packed": packed,
    "LSTMCell": lambda: step(nn.LSTMCell(IN, OUT), x(), (x(OUT), x(OUT))),
    "GRUCell": lambda: step(nn.GRUCell(IN, OUT), x(), x(OUT)),
    "RNNCell": lambda: step(nn.RNNCell(IN, OUT), x(), x(OUT)),
    "MultiheadAttention: weights": lambda: attention(True, dropout=0.1),
    "MultiheadAttention: no weights": lambda: attention(False),
    "MultiheadAttention: no weights, dropout": lambda: attention(False, dropout=0.1),
    "MultiheadAttention: bias and zeros": lambda: attention(True, add_bias_kv=True, add_zero_attn=True),
    "TransformerEncoderLayer": lambda: step(nn.TransformerEncoderLayer(OUT, 4, 64, batch_first=True), words()),
    "TransformerEncoderLayer: GELU, norm first": lambda: causal(
        nn.TransformerEncoderLayer(OUT, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    ),
    "TransformerDecoderLayer": lambda: step(
        nn.TransformerDecoderLayer(OUT, 4, 64, batch_first=True), words(), words()
    ),
    "TransformerEncoder": lambda: step(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(OUT, 4, 64, batch_first=True), 2), words()
    ),
    "TransformerDecoder": lambda: step(
        nn.TransformerDecoder(nn.TransformerDecoderLayer(OUT, 4, 64, batch_first=True), 2), words(), words()
    ),
    "Transformer": lambda: step(nn.Transformer(OUT, 4, 1, 1, 64, batch_first=True), words(), words()),
    "MaxUnpool1d": lambda: unpooled(nn.MaxPool1d(2, return_indices=True), nn.MaxUnpool1d(2), line()),
    "MaxUnpool2d": lambda: unpooled(nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2), plane()),
    "MaxUnpool3d": lambda: unpooled(nn.MaxPool3d(2, return_indices=True), nn.MaxUnpool3d(2), space()),
    "MaxPool2d": lambda: step(nn.MaxPool2d(2), plane()),
    "AvgPool2d": lambda: step(nn.AvgPool2d(2), plane()),
    "AdaptiveAvgPool2d": lambda: step(nn.AdaptiveAvgPool2d(3), plane()),
    "LPPool2d": lambda: step(nn.LPPool2d(2, 2), plane()),
    "Upsample": lambda: step(nn.Upsample(scale_factor=2, mode="bicubic"), plane()),
    "UpsamplingBilinear2d": lambda: step(nn.UpsamplingBilinear2d(scale_factor=2), plane()),
    "UpsamplingNearest2d": lambda: step(nn.UpsamplingNearest2d(scale_factor=2), plane()),
    "PixelShuffle": lambda: step(nn.PixelShuffle(2), plane()),
    "PixelUnshuffle": lambda: step(nn.PixelUnshuffle(2), plane()),
    "ChannelShuffle": lambda: step(nn.ChannelShuffle(4), plane()),
    "Unflatten": lambda: step(nn.Unflatten(1, (4, 4)), x()),
    "Fold": lambda: step(nn.Fold((5, 5), 2), image(4, 16, 16)),
    "Unfold": lambda: step(nn.Unfold(2), plane()),
    "CosineSimilarity": lambda: step(nn.CosineSimilarity(), x(), x()),
    "PairwiseDistance": lambda: step(nn.PairwiseDistance(), x(), x()),
    "TripletMarginLoss": lambda: step(nn.TripletMarginLoss(), x(), x(), x()),
    "TripletMarginWithDistanceLoss": lambda: step(nn.TripletMarginWithDistanceLoss(), x(), x(), x()),
    "CrossEntropyLoss": lambda: step(nn.CrossEntropyLoss(label_smoothing=0.1), x(), types(IN, 30)),
    "NLLLoss2d": lambda: step(nn.NLLLoss2d(), plane(), types(IN, 256).view(4, 8, 8)),
    "BCEWithLogitsLoss": lambda: step(nn.BCEWithLogitsLoss(), x(), torch.rand(30, IN)),
    "MSELoss": lambda: step(nn.MSELoss(), x(), x()),
    "SmoothL1Loss": lambda: step(nn.SmoothL1Loss(), x(), x()),
    "AdaptiveLogSoftmaxWithLoss": lambda: step(
        nn.AdaptiveLogSoftmaxWithLoss(IN, 40, [10, 20], div_value=2.0), x(), types(40, 30)
    ),
    "Linear: weight norm": lambda: step(parametrizations.weight_norm(nn.Linear(IN, OUT)), x()),
    "Linear: spectral norm": lambda: step(parametrizations.spectral_norm(nn.Linear(IN, OUT)), x()),
    "Linear: orthogonal": lambda: step(parametrizations.orthogonal(nn.Linear(IN, IN)), x()),
    "Sequential: checkpointed": checkpointed,
    "Sequential: convolutions": lambda: step(
        nn.Sequential(nn.Conv2d(IN, OUT, 3), nn.BatchNorm2d(OUT), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                      nn.Dropout2d(0.1), nn.Flatten(), nn.Linear(OUT * 9, 4)), plane(),
    ),
    "GELU: gated": lambda: step(Call(lambda value: (h := value.chunk(2, -1))[0] * nn.functional.gelu(h[1])), x(64)),
    "SiLU: gated": lambda: step(Call(lambda value: (h := value.chunk(2, -1))[0] * nn.functional.silu(h[1])), x(64)),
}  # fmt: skip
"""Each layer that the database lacks, and the most used at a size at which values are rounded; after a colon, how."""
