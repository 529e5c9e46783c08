"""Training of quantized models: distillation and quantization-aware training by transformers' Trainer."""
