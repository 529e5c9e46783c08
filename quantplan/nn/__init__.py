"""Quantized modules, and quantizing a model that is in memory."""
