"""The conditional variational autoencoder of ICM-LoRA (arXiv 2501.17635; released code, `model/CVAE_design.py`).

Encoder: stages of a convolution (kernel 7, stride 2), batch normalisation and LeakyReLU, a linear map to the latent
size, joined by the condition, then a mean and a log variance. Decoder: the same backwards with ELU, and a last
convolution to one channel. Ours differ in two things: the condition is first shifted and scaled by the mean and spread
of those in training, for hidden states of a language model are mostly what they have in common; and a vector of more
than `group` numbers is cut into pieces of equal length that one model makes in turn, told by a learned embedding which
piece it is. So a generator's size and memory do not grow with the base, but one model must know all pieces; how well it
does for more than one is not measured on large bases.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

KERNEL, PAD = 7, 3
PIECE = 32  # numbers of the embedding of a piece
MAX_STAGES, MAX_LATENT, MAX_GROUP, MAX_CONDITION = 16, 8192, 4 << 20, 1 << 16
MAX_WIDENING = 16  # channels of the first stage; twice as many of each further one


@dataclass(frozen=True, slots=True)
class IcmSettings:
    """latent: numbers of the latent of one piece; channels: of each stage, as many stages as there are; kl_weight: of
    the KL term in the loss; group: the most numbers of a piece.

    With the defaults a layout of 1.93 million numbers and a condition of 768 make a model of 7.5 million parameters.
    Raises ValueError or TypeError for what is out of bounds, as text that anyone may have written can be.
    """

    latent: int = 256
    channels: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)
    kl_weight: float = 0.005
    group: int = 2 << 20

    def __post_init__(self) -> None:
        if not all(type(number) is int for number in (self.latent, self.group, *self.channels)):
            raise TypeError("latent, group and channels are whole numbers")
        if not 1 <= self.latent <= MAX_LATENT or not 1 <= self.group <= MAX_GROUP:
            raise ValueError(f"latent is 1 to {MAX_LATENT}, group 1 to {MAX_GROUP}")
        if not 1 <= len(self.channels) <= MAX_STAGES:
            raise ValueError(f"there are 1 to {MAX_STAGES} stages")
        if any(not 1 <= count <= MAX_WIDENING << stage for stage, count in enumerate(self.channels)):
            raise ValueError(f"stage n has 1 to {MAX_WIDENING} * 2^n channels, the first being stage 0")
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError("kl_weight is a number of at least 0")

    def pieces(self, numbers: int) -> int:
        """How many a vector of `numbers` is cut into."""
        return -(-numbers // self.group)

    def length(self, numbers: int) -> int:
        """Numbers of a piece, zeros at its end included."""
        step = 1 << len(self.channels)
        return -(-numbers // (self.pieces(numbers) * step)) * step

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "channels": list(self.channels)}

    @classmethod
    def from_json(cls, told: Any) -> "IcmSettings":
        return cls(**{**told, "channels": tuple(told["channels"])})


class Cvae(nn.Module):
    """The model for vectors of `numbers`, with conditions of `condition` numbers.

    pieces: how many a vector is cut into; length: numbers of a piece, zeros at its end included, a multiple of 2 to the
    number of stages (4096 by default).
    """

    condition_mean: torch.Tensor
    condition_scale: torch.Tensor

    def __init__(self, settings: IcmSettings, numbers: int, condition: int) -> None:
        super().__init__()
        self.settings, self.numbers, self.condition = settings, numbers, condition
        self.pieces, self.length = settings.pieces(numbers), settings.length(numbers)
        channels, narrow = settings.channels, self.length >> len(settings.channels)
        told = condition + (PIECE if self.pieces > 1 else 0)
        self.embedding = nn.Parameter(torch.empty(self.pieces, PIECE).uniform_(-1, 1)) if self.pieces > 1 else None
        self.register_buffer("condition_mean", torch.zeros(condition))
        self.register_buffer("condition_scale", torch.ones(1))
        self.down = nn.Sequential(*(_down(*pair) for pair in zip((1, *channels), channels, strict=False)))
        self.linear = nn.Linear(channels[-1] * narrow, settings.latent)
        self.mean = nn.Linear(settings.latent + told, settings.latent)
        self.log_variance = nn.Linear(settings.latent + told, settings.latent)
        self.widen = nn.Linear(settings.latent + told, channels[-1] * narrow)
        backwards = channels[::-1]
        self.up = nn.Sequential(*(_up(*pair) for pair in zip(backwards, (*backwards[1:], channels[0]), strict=True)))
        self.last = nn.Conv1d(channels[0], 1, KERNEL, padding=PAD)

    @property
    def _share(self) -> int:
        return -(-self.numbers // self.pieces)

    @property
    def latent(self) -> int:
        """Numbers of the latent of a whole vector."""
        return self.pieces * self.settings.latent

    def cut(self, vector: torch.Tensor) -> torch.Tensor:
        """[numbers] -> [pieces, length], with zeros where a piece ends."""
        whole = F.pad(vector, (0, self.pieces * self._share - self.numbers)).view(self.pieces, self._share)
        return F.pad(whole, (0, self.length - self._share))

    def joined(self, rows: torch.Tensor) -> torch.Tensor:
        """`cut` undone."""
        return rows[:, : self._share].reshape(-1)[: self.numbers]

    def encode(
        self, rows: torch.Tensor, condition: torch.Tensor, piece: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance [n, latent] of rows [n, length]. condition: [n, condition]; piece: int64 [n]."""
        found = self.linear(self.down(rows[:, None]).flatten(1))
        told = torch.cat([found, self._told(condition, piece)], dim=1)
        return self.mean(told), self.log_variance(told)

    def decode(self, z: torch.Tensor, condition: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
        """[n, latent] -> [n, length]."""
        wide = self.widen(torch.cat([z, self._told(condition, piece)], dim=1))
        return self.last(self.up(wide.view(len(z), self.settings.channels[-1], -1)))[:, 0]  # type: ignore[no-any-return]

    def _told(self, condition: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
        scaled = (condition - self.condition_mean) / self.condition_scale
        return scaled if self.embedding is None else torch.cat([scaled, self.embedding[piece]], dim=1)


def loss(
    given: torch.Tensor, made: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of the rows, and KL divergence from N(0, I), mean over rows, in nats."""
    divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(dim=1).mean()
    return F.mse_loss(made, given), divergence


def _norm(channels: int) -> nn.BatchNorm1d:
    made = nn.BatchNorm1d(channels)
    made.num_batches_tracked = None  # a count that only a momentum of None needs, and no number of the model
    return made


def _down(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(inputs, outputs, KERNEL, 2, PAD), _norm(outputs), nn.LeakyReLU())


def _up(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose1d(inputs, outputs, KERNEL, 2, PAD, output_padding=1), _norm(outputs), nn.ELU()
    )
