"""`QConfig`: which observers or fake quantizers a layer's weight and inputs get, under torch.ao's names and with its defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from quantplan.errors import did_you_mean, fail
from quantplan.nn.affine import (
    FakeQuantize,
    default_dynamic_fake_quant,
    default_fake_quant,
    default_per_channel_weight_fake_quant,
    default_weight_fake_quant,
)
from quantplan.nn.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)

BACKENDS = ("fbgemm", "onednn", "qnnpack", "x86")
_WHOLE_CODES = ("onednn", "qnnpack")  # the others leave a bit of activations free, so that sums of products do not overflow


class QConfig(NamedTuple):
    """Factories of observers or `FakeQuantize`s: call one for a fresh one."""

    activation: Callable[[], Any]
    weight: Callable[[], Any]


default_observer = MinMaxObserver.with_args(quant_min=0, quant_max=127)
default_weight_observer = MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
default_per_channel_weight_observer = PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
default_dynamic_observer = PlaceholderObserver.with_args(dtype=torch.quint8, quant_min=0, quant_max=255, is_dynamic=True)

default_qconfig = QConfig(default_observer, default_weight_observer)
default_per_channel_qconfig = QConfig(default_observer, default_per_channel_weight_observer)
default_dynamic_qconfig = QConfig(default_dynamic_observer, default_weight_observer)
per_channel_dynamic_qconfig = QConfig(default_dynamic_observer, default_per_channel_weight_observer)
float16_dynamic_qconfig = QConfig(
    PlaceholderObserver.with_args(dtype=torch.float16, is_dynamic=True), PlaceholderObserver.with_args(dtype=torch.float16)
)
default_qat_qconfig = QConfig(default_fake_quant, default_weight_fake_quant)
default_dynamic_qat_qconfig = QConfig(default_dynamic_fake_quant, default_per_channel_weight_fake_quant)


def get_default_qconfig(backend: str = "x86") -> QConfig:
    """Static quantization for a backend: histograms for inputs, for weights a scale for each channel (qnnpack: one). Raises
    QuantplanError QP105 for an unknown backend."""
    weight = default_weight_observer if _known(backend) == "qnnpack" else default_per_channel_weight_observer
    return QConfig(HistogramObserver.with_args(reduce_range=backend not in _WHOLE_CODES), weight)


def get_default_qat_qconfig(backend: str = "x86") -> QConfig:
    """Training for a backend: moving averages, for weights a scale for each channel (qnnpack: one). Raises QuantplanError QP105
    for an unknown backend."""
    weight = default_weight_fake_quant if _known(backend) == "qnnpack" else default_per_channel_weight_fake_quant
    inputs = FakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, reduce_range=backend not in _WHOLE_CODES
    )
    return QConfig(inputs, weight)


class QConfigMapping:
    """A QConfig for the model, for classes and for names; a name goes before a class, a class before the model."""

    def __init__(self) -> None:
        self.everything: QConfig | None = None
        self.types: dict[type, QConfig | None] = {}
        self.names: dict[str, QConfig | None] = {}

    def set_global(self, qconfig: QConfig | None) -> QConfigMapping:
        """For all layers."""
        self.everything = qconfig
        return self

    def set_object_type(self, kind: type, qconfig: QConfig | None) -> QConfigMapping:
        """For layers of a class."""
        self.types[kind] = qconfig
        return self

    def set_module_name(self, name: str, qconfig: QConfig | None) -> QConfigMapping:
        """For a module and all in it."""
        self.names[name] = qconfig
        return self


def get_default_qconfig_mapping(backend: str = "x86") -> QConfigMapping:
    """`get_default_qconfig` for all layers."""
    return QConfigMapping().set_global(get_default_qconfig(backend))


def get_default_qat_qconfig_mapping(backend: str = "x86") -> QConfigMapping:
    """`get_default_qat_qconfig` for all layers."""
    return QConfigMapping().set_global(get_default_qat_qconfig(backend))


def _known(backend: str) -> str:
    if backend not in BACKENDS:
        raise fail("QP105", f"unknown backend '{backend}'", did_you_mean(backend, list(BACKENDS)))
    return backend
