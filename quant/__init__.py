"""What the bytes of a GGUF file mean, and the kernels that multiply them. Knows no model."""
