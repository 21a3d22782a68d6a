"""Losses of recommenders, as people write them: exact in exact mode, and a gradient that is little off at 8 bits.

Many divide by what was rounded, or take its logarithm, and say so in words of their own.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from comparing import assert_exact, compressed, gradients, made
from torch import Tensor
from torch.distributions import Bernoulli, Beta, Categorical, Normal, kl_divergence
from torch.nn import functional as F

NODES, WIDTH, USERS, NEGATIVES = 6000, 64, 64, 8


class Batch(NamedTuple):
    """What a loss is taken of.

    Attributes:
        user: ``[USERS, WIDTH]``.
        item: an item of each, the same shape.
        others: ``[USERS, NEGATIVES, WIDTH]``.
        score: of the item, ``[USERS]``.
        scores: of the others, ``[USERS, NEGATIVES]``.
        mixed: both as a layer makes them, ``[USERS, WIDTH]`` each.
    """

    user: Tensor
    item: Tensor
    others: Tensor
    score: Tensor
    scores: Tensor
    mixed: tuple[Tensor, Tensor]


def sampled_softmax(b: Batch, temperature: float) -> Tensor:
    user, item, others = (F.normalize(rows, dim=-1) for rows in (b.user, b.item, b.others))
    score = ((user * item).sum(-1) / temperature).exp()
    return -torch.log(score / (score + ((user[:, None] * others).sum(-1) / temperature).exp().sum(-1)))


def in_batch(b: Batch, temperature: float) -> Tensor:
    scores = F.normalize(b.user, dim=-1) @ F.normalize(b.item, dim=-1).t() / temperature
    return -(scores.diag().exp() / scores.exp().sum(1)).log()


def self_distillation(b: Batch, eps: float) -> Tensor:
    one, other = b.scores.softmax(1), b.scores.flip(0).softmax(1)
    return one * ((one + eps).log() - (other + eps).log())


def entropy(b: Batch) -> Tensor:
    chosen = b.scores.softmax(1)
    return -chosen * (chosen + 1e-12).log()


def jensen_shannon(b: Batch) -> Tensor:
    one, other = b.scores.softmax(1), b.scores.flip(0).softmax(1)
    middle = (one + other) / 2
    return one * (one / middle).log() + other * (other / middle).log()


def focal(b: Batch) -> Tensor:
    hit, missed = b.score.sigmoid(), b.scores.sigmoid()
    return -((1 - hit) ** 2 * torch.log(hit + 1e-10)).mean() - (missed**2 * torch.log(1 - missed + 1e-10)).mean()


def align_and_spread(b: Batch) -> Tensor:
    user, item = F.normalize(b.user, dim=-1), F.normalize(b.item, dim=-1)
    return (user - item).norm(dim=-1).square().mean() + torch.pdist(user).square().mul(-2).exp().mean().log()


def decorrelated(b: Batch) -> Tensor:
    user, item = ((rows - rows.mean(0)) / rows.std(0) for rows in (b.user, b.item))
    correlations = user.t() @ item / USERS
    return (correlations.diag() - 1).square().sum() + 0.01 * correlations.square().sum()


def between_gaussians(b: Batch, variance: Callable[[Tensor], Tensor]) -> Tensor:
    one, other = map(variance, b.mixed)
    return one / other + (b.user - b.item) ** 2 / other + other.log() - one.log()


def between_betas(b: Batch) -> Tensor:
    one, other = (F.softplus(rows) + 0.05 for rows in b.mixed)
    return kl_divergence(Beta(one, other), Beta(one.flip(0), other.flip(0)))


def clusters(b: Batch) -> Tensor:
    near = 1 / (1 + (b.user[:, None] - b.others).square().sum(-1))
    near = near / near.sum(1, keepdim=True)
    target = (near**2 / near.sum(0)).detach()
    target = target / target.sum(1, keepdim=True)
    return target * (target / near).log()


def transported(b: Batch) -> Tensor:
    far = torch.cdist(b.user, b.item)
    plan = torch.exp(-far / 0.5)
    plan = plan / plan.sum(0, keepdim=True)
    return plan / plan.sum(1, keepdim=True) * far


def smooth_ranks(b: Batch) -> Tensor:
    ranks = ((b.scores[:, None] - b.scores[:, :, None]) / 0.5).sigmoid().sum(1) + 0.5
    return -1 / torch.log2(1 + ranks)


def angle(b: Batch) -> Tensor:
    cosine = (F.normalize(b.user, dim=-1) * F.normalize(b.item, dim=-1)).sum(-1)
    return torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))


LIKED = (torch.arange(USERS * NEGATIVES).view(USERS, NEGATIVES) % 3 == 0).float()

LOSSES: dict[str, Callable[[Batch], Tensor]] = {
    "bpr": lambda b: -torch.log((b.score[:, None] - b.scores).sigmoid()),
    "bpr with an epsilon": lambda b: -torch.log((b.score[:, None] - b.scores).sigmoid() + 1e-10),
    "bpr by softplus": lambda b: F.softplus(b.scores - b.score[:, None]),
    "bpr weighted by softmax": lambda b: -b.scores.softmax(1) * torch.log((b.score[:, None] - b.scores).sigmoid()),
    "click probability": lambda b: F.binary_cross_entropy(b.scores.sigmoid(), LIKED),
    "click logits": lambda b: F.binary_cross_entropy_with_logits(b.scores, LIKED),
    "two logarithms": lambda b: (
        -torch.log(b.score.sigmoid() + 1e-8)[:, None] - torch.log(1 - b.scores.sigmoid() + 1e-8)
    ),
    "weighted before the logarithm": lambda b: -torch.log(b.score.sigmoid() * torch.linspace(0.1, 1, USERS) + 1e-10),
    "self-adversarial": lambda b: -b.scores.softmax(1).detach() * F.logsigmoid(-b.scores),
    "focal": focal,
    "squared": lambda b: (b.scores.sigmoid() - LIKED) ** 2,
    "hinge": lambda b: (1 - b.score[:, None] + b.scores).clamp(min=0),
    "warp": lambda b: torch.log1p((1 - b.score[:, None] + b.scores).relu().sum(1)),
    "cross entropy": lambda b: F.cross_entropy(b.scores, LIKED.argmax(1)),
    "negative logarithm of a softmax": lambda b: -torch.log(b.scores.softmax(1)[:, 0] + 1e-10),
    "sampled softmax": lambda b: sampled_softmax(b, 0.1),
    "log of a sum": lambda b: torch.log(b.score.exp() + b.scores.exp().sum(1)) - b.score,
    "in-batch": lambda b: in_batch(b, 0.1),
    "listwise": lambda b: -LIKED.softmax(1) * b.scores.log_softmax(1),
    "smooth ranks": smooth_ranks,
    "divergence": lambda b: self_distillation(b, 0.0),
    "divergence with an epsilon": lambda b: self_distillation(b, 1e-10),
    "divergence by name": lambda b: F.kl_div(b.scores.log_softmax(1), b.scores.flip(0).softmax(1), reduction="sum"),
    "jensen-shannon": jensen_shannon,
    "entropy": entropy,
    "cosine": lambda b: 1 - F.cosine_similarity(b.user, b.item),
    "angle": angle,
    "alignment and uniformity": align_and_spread,
    "decorrelated": decorrelated,
    "translated, l1": lambda b: (b.user - b.item).abs().sum(-1)[:, None] - (b.user[:, None] - b.others).abs().sum(-1),
    "translated, l2": lambda b: (b.user - b.item).norm(dim=-1)[:, None] - (b.user[:, None] - b.others).norm(dim=-1),
    "gaussians by exp": lambda b: between_gaussians(b, torch.exp),
    "gaussians by softplus": lambda b: between_gaussians(b, lambda rows: F.softplus(rows) + 1e-6),
    "gaussian by name": lambda b: F.gaussian_nll_loss(b.user, b.item.detach(), b.mixed[0].exp()),
    "betas": between_betas,
    "normal density": lambda b: -Normal(b.mixed[0], F.softplus(b.mixed[1]) + 1e-3).log_prob(b.user.detach()),
    "bernoulli": lambda b: -Bernoulli(probs=b.scores.sigmoid()).log_prob(LIKED),
    "categorical": lambda b: -Categorical(probs=b.scores.softmax(1)).log_prob(LIKED.argmax(1)),
    "squashed": lambda b: torch.log(1 - torch.tanh(b.mixed[0]) ** 2 + 1e-6),
    "complementary": lambda b: -torch.log(1 - torch.exp(-torch.exp(b.score.clamp(max=3))) + 1e-8),
    "root": lambda b: torch.sqrt(b.scores.sigmoid() + 1e-8),
    "dice": lambda b: 1 - 2 * (b.scores.sigmoid() * LIKED).sum() / (b.scores.sigmoid().sum() + LIKED.sum()),
    "clusters": clusters,
    "transported": transported,
}


class Step:
    """A step: an encoder, and a loss right after it, or once what the encoder made has gone."""

    def __init__(self, name: str, between: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        self.nodes = (torch.randn(NODES, WIDTH, generator=draw) * 0.6).requires_grad_()
        self.weight = (torch.randn(WIDTH, WIDTH, generator=draw) / 8).requires_grad_()
        self.others = torch.randn(NODES, WIDTH, generator=draw).requires_grad_()
        self.user, self.item = torch.randint(NODES, (2, USERS), generator=draw)
        self.negative = torch.randint(NODES, (USERS, NEGATIVES), generator=draw)
        self.name, self.between = name, between

    def __call__(self) -> Tensor:
        encoded = torch.tanh(self.nodes @ self.weight) + self.nodes
        user, item, others = encoded[self.user], encoded[self.item], encoded[self.negative]
        score, scores = (user * item).sum(-1), (user[:, None] * others).sum(-1)
        batch = Batch(user, item, others, score, scores, (user @ self.weight, item @ self.weight))
        total = torch.zeros(())
        if self.between:
            for _ in range(3):
                total = total + 0 * (made(self.others) * made(self.others).detach()).sum()
        return total + LOSSES[self.name](batch).mean()

    @property
    def leaves(self) -> list[Tensor]:
        return [self.nodes, self.weight]


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_exactly(name: str, between: bool) -> None:
    step = Step(name, between)
    assert_exact(step, step.leaves)


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_at_8_bits(name: str, between: bool) -> None:
    step = Step(name, between)
    want = torch.cat(gradients(step, step.leaves))
    for seed in range(3):
        got = torch.cat(compressed(step, step.leaves, 8, seed=seed)[0])
        assert (got - want).norm() < 0.03 * want.norm()
