"""Distillation: the quantized embeddings are to rank as the full-precision ones did that they started from."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_tinykg.arguments import check_whole

__all__ = ["Teacher", "ranking_loss"]


class Teacher:
    """The embeddings before quantization was trained, and the items they put first for every user.

    Args:
        users: Float `[num_users, d]`.
        items: Float `[num_items, d]`.
        top: How many of each user's best items are kept; at most all.

    Raises:
        ValueError: If `top` is less than 1.

    Example:
        >>> teacher = Teacher(torch.tensor([[1.0]]), torch.tensor([[3.0], [9.0], [5.0]]), top=2)
        >>> teacher.best
        tensor([[1, 2]])
    """

    def __init__(self, users: Tensor, items: Tensor, top: int = 50) -> None:
        check_whole("top", top, 1)
        self.users, self.items = users.detach().float(), items.detach().float()
        top = min(top, items.size(0))
        self.best = torch.cat([(chunk @ self.items.t()).topk(top).indices for chunk in self.users.split(1024)])

    def to(self, device: torch.device) -> "Teacher":
        """Move to a device, in place."""
        self.users, self.items, self.best = (x.to(device) for x in (self.users, self.items, self.best))
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold: the encoder has since moved on."""
        return {"users": self.users, "items": self.items, "best": self.best}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "Teacher":
        """The teacher that `state_dict` was taken of."""
        teacher = cls.__new__(cls)
        teacher.users, teacher.items, teacher.best = state["users"], state["items"], state["best"]
        return teacher

    def loss(self, users: Tensor, items: Tensor, user: Tensor, others: Tensor, temperature: float = 1.0) -> Tensor:
        """`ranking_loss` of the batch's users over each one's best items and some items that all are asked about.

        Args:
            users: The student's embeddings of the batch's users, `[B, d]`.
            items: The student's items, `[num_items, d]`.
            user: Ids of the batch's users, int64 `[B]`.
            others: Ids of the items that all of them are asked about, int64 `[O]`.
            temperature: See `ranking_loss`.

        Returns:
            A scalar.
        """
        best = self.best[user]
        student = torch.cat([_scores(users, items, best), users @ items[others].t()], dim=1)
        mine = self.users[user]
        teacher = torch.cat([_scores(mine, self.items, best), mine @ self.items[others].t()], dim=1)
        return ranking_loss(student, teacher, temperature)


def _scores(users: Tensor, items: Tensor, index: Tensor) -> Tensor:
    """Scores of `index[b, r]` for user `b`: `[B, R]`."""
    return torch.bmm(items[index], users[:, :, None]).squeeze(2)


def ranking_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r"""How much of the teacher's ranking the student misses: `KL(softmax(t / T) || softmax(s / T))`, times `T^2`.

    The listwise form of distillation (Hinton et al., arXiv 1503.02531, section 2, with its factor `T^2`): for each user
    the probability of each candidate to be the first. Scores may be shifted by a constant per user.

    Args:
        student: Scores `[B, C]`.
        teacher: Scores of the same candidates, `[B, C]`.
        temperature: `T`.

    Returns:
        The mean over users, a scalar; 0 where the scores agree.

    Example:
        >>> scores = torch.tensor([[1.0, 2.0, 3.0]])
        >>> f"{ranking_loss(scores + 5, scores):.4f} {ranking_loss(-scores, scores):.4f}"
        '0.0000 1.1504'
    """
    target = F.log_softmax(teacher / temperature, dim=1)
    found = F.log_softmax(student / temperature, dim=1)
    return F.kl_div(found, target, reduction="batchmean", log_target=True) * temperature**2
