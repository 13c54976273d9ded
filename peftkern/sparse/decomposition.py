"""Which few entries of a matrix a low-rank matrix cannot stand in for: W ≈ U V + S with a sparse S.

    U = orth((W - S) Vᵀ)      V = Uᵀ (W - S)      S = the k largest entries of W - U V

twice over, for U V of rank 1, 2, 3, and so on: V then grows by the first row of the R of a QR decomposition of what is
left, E = W - U V - S. That is qᵀ E, q being the first column of E at length 1.

Source: DSEE, Chen et al. 2021 (arXiv:2111.00160), section 3.2, whose code takes the loop from GreBsmo (Zhou and Tao
2013). That code empties S in every round, keeps in it whatever is at least 0.01, and grows V by 5 rows up to some 500.
Then U V is all of a W of low rank, outliers included: of 5 outliers over a matrix of rank 2 it finds none. Here S is
kept from round to round and holds exactly k entries, so that what is in S is not fitted, and V grows by one row: of
outliers three times as large as the other entries it finds all, where growing by 5 misses one in five.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.select_top import select_top


@torch.no_grad()
def sparse_entries(weight: Tensor, count: int, rank: int = 16, seed: int = 0) -> Tensor:
    """Where the sparse part of ``weight`` is: flat positions, [count] int64, ascending.

    Args:
        weight: W, [out, in] float32.
        count: k, from 0 to out * in.
        rank: of U V in the end; the smaller side of W at most.
        seed: of the first V, a row of normal numbers.

    Raises:
        ValueError: ``count`` is out of range, or W holds NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(1, weight.shape[1], generator=generator).to(weight.device)
    sparse, chosen = torch.zeros_like(weight), torch.empty(0, dtype=torch.int64, device=weight.device)
    while True:
        for _ in range(2):
            rest = weight - sparse
            u = torch.linalg.qr(rest @ v.t()).Q
            v = u.t() @ rest
            residual = weight - u @ v
            chosen = select_top([residual], count)[0]
            sparse = torch.zeros_like(weight)
            sparse.view(-1)[chosen] = residual.view(-1)[chosen]
        if v.shape[0] >= min(rank, *weight.shape):
            return chosen
        error = residual - sparse
        q = torch.linalg.qr(error[:, :1]).Q
        v = torch.cat([v, q.t() @ error])
