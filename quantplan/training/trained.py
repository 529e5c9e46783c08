"""What training made, as the writer of outputs asks for it: matrices from the trained layers, all else from the start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from quantplan.checkpoint.reader import TensorReader
from quantplan.engine.verify import changed_tensors, read_record
from quantplan.format import FORMATS
from quantplan.kv_cache import SCALES
from quantplan.nn.fake_quantized import FakeQuantized
from quantplan.plan.resolve import Resolution
from quantplan.scheme import Params, SchemeConfig
from quantplan.tensor import QuantizedTensor


class Started:
    """An output of `apply`, read: the matrices it stores, what it found for static inputs, tensors that transforms changed."""

    def __init__(self, resolution: Resolution, reader: TensorReader) -> None:
        self.reader = reader
        self._format = FORMATS.get(resolution.plan.output.format)()
        self._matrices = {m.name: (m, a) for a in resolution.quantized for m in a.matrices}
        self.changed = changed_tensors(read_record(reader.folder))

    def __contains__(self, matrix: object) -> bool:
        return matrix in self._matrices

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def read(self, matrix: str, scheme: SchemeConfig | None = None) -> QuantizedTensor:
        """One stored matrix."""
        found, assignment = self._matrices[matrix]
        assert assignment.wq is not None
        return self._format.decode(found, assignment.wq, assignment.aq, self.reader.read)

    def inputs(self, matrix: str) -> Params:
        """What was found for the static activations of one matrix, or for the cache of one attention module."""
        if matrix in self._matrices:
            found, assignment = self._matrices[matrix]
            return self._format.decode_inputs(found, assignment.aq, self.reader.read)
        return {s: self.reader.read(f"{matrix}.{s}") for s in SCALES if f"{matrix}.{s}" in self.reader.tensors}

    def replacement(self, tensor: str) -> Tensor | None:
        """What a transform made of a stored tensor that is not quantized; None when it left it alone."""
        return self.reader.read(tensor) if tensor in self.changed and tensor in self.reader.tensors else None


class TrainedTensors:
    """The tensors of a trained model where it has trained them, else those of the start; read as `SolvedBlocks` are.

    `layers`: stored matrix -> its trained layer; `floats`: stored tensor that stays in floating point -> its trained value.
    """

    def __init__(self, start: Started, layers: Mapping[str, FakeQuantized], floats: Mapping[str, Tensor]) -> None:
        self._start, self._layers, self._floats = start, layers, floats

    def __contains__(self, matrix: object) -> bool:
        return matrix in self._start

    def read(self, matrix: str, scheme: SchemeConfig) -> QuantizedTensor:
        """One matrix."""
        layer = self._layers.get(matrix)
        return self._start.read(matrix) if layer is None else layer.weight_fake_quant.solve(layer.weight)

    def inputs(self, matrix: str) -> Params:
        """What was found for static activations, or for the cache of one attention module."""
        layer = self._layers.get(matrix)
        found = layer.input_fake_quant.static() if layer is not None and layer.input_fake_quant is not None else None
        return self._start.inputs(matrix) if found is None else found

    @property
    def changed(self) -> frozenset[str]:
        """The stored tensors that are not as the source has them, though they are not quantized."""
        return frozenset(self._floats) | self._start.changed

    def replacement(self, tensor: str) -> Tensor | None:
        """What became of a stored tensor that is not quantized; None where nothing did."""
        found = self._floats.get(tensor)
        return self._start.replacement(tensor) if found is None else found.detach()
