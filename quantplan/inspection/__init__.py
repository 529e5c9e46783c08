"""Looking into checkpoints: ranges, scales, saturation, outliers, and errors layer by layer."""
