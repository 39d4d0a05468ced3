"""Text generation: many sequences at once on one causal language model."""
