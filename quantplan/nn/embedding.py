"""`QuantEmbedding`: a table whose rows are stored quantized, and dequantized when they are looked up."""

from __future__ import annotations

import torch
from torch import Tensor

from quantplan.nn.stored import Device, StoredWeight
from quantplan.numerics import unpack_bits
from quantplan.scheme import SchemeConfig
from quantplan.tensor import QuantizedTensor


class QuantEmbedding(StoredWeight):
    """Rows `[embeddings, features]` on a scheme's grid; `forward` decodes those it is asked for."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        wq: SchemeConfig,
        *,
        padding_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Uninitialised storage; `dtype`: of the rows that come out. Raises QP114 when groups do not divide `embedding_dim`."""
        super().__init__((num_embeddings, embedding_dim), wq, None, False, device, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    @classmethod
    def from_quantized(
        cls, quantized: QuantizedTensor, *, padding_idx: int | None = None, dtype: torch.dtype | None = None
    ) -> QuantEmbedding:
        """A table with these rows."""
        rows, columns = quantized.shape
        made = cls(rows, columns, quantized.scheme, padding_idx=padding_idx, device="meta", dtype=dtype)
        made.fill(quantized)
        return made

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """Ids of any shape -> `[..., embedding_dim]`, in `dtype`."""
        rows, columns = self.num_embeddings, self.embedding_dim
        flat, own, quantizer = ids.reshape(-1), self.wq.tensor_params, self.wq.quantizer()
        codes = unpack_bits(self.weight_codes[flat], self.wq.bits, columns)
        stored = {n: self._stored(f"weight_{n}") for n in self.wq.param_layout(rows, columns)}
        spread, wide = quantizer.spread({n: p if n in own else p.unsqueeze(-1) for n, p in stored.items()}, rows, columns)
        params = {n: p if n in own else _picked(p, flat) for n, p in spread.items()}
        groups = torch.nn.functional.pad(codes, (0, -columns % wide)).view(len(flat), -1, wide)
        values = quantizer.decode(groups, params).reshape(len(flat), -1)[:, :columns]
        return values.to(self.dtype).view(*ids.shape, columns)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._schemes()}"


def _picked(param: Tensor, rows: Tensor) -> Tensor:
    """Rows of a parameter, by its bytes: float8 cannot be indexed everywhere."""
    return param.contiguous().view(torch.uint8).view(*param.shape[:-1], -1)[rows].view(param.dtype)
