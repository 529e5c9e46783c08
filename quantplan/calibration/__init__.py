"""Calibration data: from what a plan names to token ids and a mask. Torch is imported when it computes."""
