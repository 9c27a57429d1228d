"""The nearest of very many images, which stream by a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor


class Neighbours:
    """For each query the nearest image so far: its index and its Euclidean distance."""

    def __init__(
        self,
        queries: Tensor,  # [q, F]
        themselves: Tensor | None = None,  # [q]: index of the query itself among the images, which is no neighbour
    ) -> None:
        self.indices = torch.full((len(queries),), -1, device=queries.device)  # [q]
        self._queries, self._themselves = queries.double(), None if themselves is None else themselves.to(queries.device)
        self._squares = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=queries.device)

    @property
    def distances(self) -> Tensor:  # [q] float64
        """Distance to the nearest image; infinite where there was none."""
        return self._squares.sqrt()

    def look(
        self,
        start: int,
        images: Tensor,  # [n, F]: images start, start + 1, …
    ) -> None:
        """Take a batch into account."""
        images = images.double()
        squares = self._queries.square().sum(1)[:, None] + images.square().sum(1) - 2 * self._queries @ images.T  # [q, n]
        if self._themselves is not None:
            own = (self._themselves - start)[:, None] == torch.arange(len(images), device=images.device)
            squares.masked_fill_(own, torch.inf)
        least, place = squares.min(1)
        near = (self._queries - images[place]).square().sum(1)  # again, exactly: a copy is at distance 0
        better = near.where(least < torch.inf, least) < self._squares
        self.indices[better] = start + place[better]
        self._squares[better] = near[better]
