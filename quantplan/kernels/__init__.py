"""How quantized linears are computed, one file a kernel."""
