"""A few feature vectors of each class, kept from step to step, and how near to them other features of the class are.

Features are ``(N, K)``, one row a voxel, labels ``(N,)``. Nothing of the background is ever stored. Sources: Alonso et
al., ICCV 2021; ycwu1997/SS-Net code/utils/feature_memory.py and contrastive_losses.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ClassScores(nn.Module):
    """A network of two layers for each class that gives a feature vector its score; batch norm always uses the batch.

    Weights are stacked over the classes, ``(C, outputs, inputs)``, and start as PyTorch starts linear layers.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.hidden_weight = nn.Parameter(torch.empty(num_classes, width, width).uniform_(-bound, bound))
        self.hidden_bias = nn.Parameter(torch.empty(num_classes, width).uniform_(-bound, bound))
        self.norm_weight = nn.Parameter(torch.ones(num_classes, width))
        self.norm_bias = nn.Parameter(torch.zeros(num_classes, width))
        self.out_weight = nn.Parameter(torch.empty(num_classes, 1, width).uniform_(-bound, bound))
        self.out_bias = nn.Parameter(torch.empty(num_classes, 1).uniform_(-bound, bound))

    def forward(self, features: Tensor, name: int) -> Tensor:
        """Scores ``(N,)`` before their sigmoid of N > 1 features of class ``name``."""
        hidden = F.linear(features, self.hidden_weight[name], self.hidden_bias[name]).float()
        hidden = F.batch_norm(hidden, None, None, self.norm_weight[name], self.norm_bias[name], training=True)
        return F.linear(F.leaky_relu(hidden, 0.2), self.out_weight[name], self.out_bias[name])[:, 0].float()


class MemoryBank(nn.Module):
    """At most ``size`` vectors of K numbers for each class, in buffers, so that a resumed training has them too."""

    vectors: Tensor  # (C, size, K)
    count: Tensor  # (C,) int64, how many are stored; 0 = not filled

    def __init__(self, num_classes: int, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(num_classes, size, width))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))

    def __len__(self) -> int:
        """C."""
        return len(self.count)

    def __getitem__(self, name: int) -> Tensor:
        """The vectors ``(count, K)`` of class ``name``."""
        return self.vectors[name, : int(self.count[name])]

    @torch.no_grad()
    def update(
        self, features: Tensor, labels: Tensor, scores: ClassScores, keep: Literal["lowest", "highest"] = "lowest"
    ) -> None:
        """Replace what is stored of every foreground class that occurs; what of others is stored stays.

        Of more than ``size`` candidates those with the lowest scores are kept, lowest first: the official code sorts in
        ascending order and takes the head, though its comment speaks of the highest.
        """
        size = self.vectors.shape[1]
        for name in range(1, len(self)):
            found = features[labels == name]
            if len(found) > size:
                found = found[scores(found, name).topk(size, largest=keep == "highest").indices]
            if len(found):
                self.vectors[name].zero_()[: len(found)] = found
                self.count[name] = len(found)


def contrastive_loss(features: Tensor, labels: Tensor, bank: MemoryBank, scores: ClassScores) -> Tensor:
    """Sum over classes of ``sum_i s_i (1 - mean_j cos(v_i, m_j)) / sum_i s_i``, over the number of all classes.

    v_i are the features of a class, s_i the sigmoid of their scores, which learn but send no gradient to the features,
    and m_j what the bank stores of that class. Classes with less than two of either count 0. The mean of cosines is one
    scalar product with the mean of the unit vectors m_j, so nothing as large as voxels times vectors is made.
    """
    total = features.new_zeros(())
    for name in range(1, len(bank)):
        own, memory = features[labels == name], bank[name]
        if min(len(own), len(memory)) > 1:
            weights = scores(own.detach(), name).sigmoid()
            with torch.autocast(own.device.type, enabled=False):  # sums over a million voxels need all their digits
                cosines = own @ F.normalize(memory, dim=1).mean(dim=0) / own.norm(dim=1).clamp(min=1e-12)
            total = total + (weights * (1.0 - cosines)).sum() / weights.sum()
    return total / len(bank)


def some_of_each(labels: Tensor, num_classes: int, most: int) -> Tensor:
    """Places ``(n,)`` in ``labels`` ``(N,)`` of at most ``most`` random voxels of each class."""
    found = [(labels == name).nonzero().flatten() for name in range(num_classes)]
    return torch.cat([places[torch.randperm(len(places), device=labels.device)[:most]] for places in found])
