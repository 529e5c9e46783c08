"""What must be known of Hugging Face models: modules, fused siblings, what is kept by default. Torch-free."""
