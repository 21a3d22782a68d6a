"""The accuracy that is expected without labels: it is right, and it tells apart what a few labels can't."""

import math

import pytest
import torch

from lightning_tinykg import ExpectedAccuracy


def classifier(rows: int, sharpness: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from them sharpened: above 1, it is right more often than it says."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 5, generator=generator)
    labels = torch.multinomial((logits * sharpness).softmax(dim=-1), 1, generator=generator).squeeze(1)
    return logits, labels


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_it_is_the_accuracy(sharpness: float) -> None:
    logits, labels = classifier(100_000, sharpness)
    known = torch.arange(5_000)
    expected = ExpectedAccuracy(logits, labels, known)
    assert expected.temperature == pytest.approx(1 / sharpness, rel=0.1)
    worse = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    for q in (logits, worse):
        true = float((q.argmax(dim=-1) == labels)[5_000:].float().mean())
        # of the labels that it has not seen, and of the five thousand that the temperature is from
        error = math.sqrt(true * (1 - true)) * (1 / math.sqrt(95_000) + 1 / math.sqrt(5_000))
        assert abs(expected(q) - true) < 4 * error
    assert expected(worse) < expected.full == expected(logits)


def test_it_tells_apart_what_few_labels_cannot() -> None:
    """Of two classifiers, one of which is worse by half a point: by 200 labels it is a toss-up."""
    right = by_labels = 0
    for seed in range(20):
        logits, labels = classifier(10_000, 2.0, seed)
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(100 + seed))
        better, worse = logits + 0.03 * noise, logits + 0.09 * noise.flip(0)
        expected = ExpectedAccuracy(logits, labels, torch.arange(200))
        right += expected(better) > expected(worse)
        few = (labels[:200, None] == torch.stack([better, worse])[:, :200].argmax(dim=-1).T).float().mean(dim=0)
        by_labels += bool(few[0] > few[1])
    assert right == 20 > 15 > by_labels


def test_what_is_learned_is_full_precision() -> None:
    logits, labels = classifier(1000, 2.0)
    expected = ExpectedAccuracy(logits, labels, torch.arange(1000) < 200)
    student = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(expected.loss(student), student)
    assert slope.abs().max() < 1e-6, "it has nothing to learn"
    assert expected.loss(logits + torch.randn_like(logits)) > expected.loss(logits)


def test_what_does_not_go_together_is_refused() -> None:
    logits, labels = classifier(10, 1.0)
    known = torch.arange(5)
    with pytest.raises(ValueError, match=r"logits must be of shape \[N, classes\], got \[10\]"):
        ExpectedAccuracy(logits[:, 0], labels, known)
    with pytest.raises(ValueError, match=r"labels must be of shape \[10\], one for each row, got \[9\]"):
        ExpectedAccuracy(logits, labels[:9], known)
    with pytest.raises(ValueError, match="known must name at least one label, got none"):
        ExpectedAccuracy(logits, labels, known[:0])
    with pytest.raises(ValueError, match="labels must be from 0 to 4, got 7"):
        ExpectedAccuracy(logits, labels.index_fill(0, torch.tensor([3]), 7), known)
    ExpectedAccuracy(logits, labels.index_fill(0, torch.tensor([7]), -1), known)  # which is not known
    expected = ExpectedAccuracy(logits, labels, known)
    for asks in (expected, expected.loss):
        with pytest.raises(ValueError, match=r"logits must be of shape \[10, 5\], got \[10, 4\]"):
            asks(logits[:, :4])
