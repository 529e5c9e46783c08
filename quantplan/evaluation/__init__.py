"""How good a model is: perplexity, KL divergence and top-1 agreement."""
