"""Plain modules: tensors in, tensors out, with a signature that comes from the model."""
