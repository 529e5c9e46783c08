"""What calibration must know of a transformers model, found by inspecting it: blocks, names, inputs, what scales what."""
