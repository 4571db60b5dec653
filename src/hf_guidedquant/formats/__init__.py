"""How codes are laid out as named tensors. A format declares names, shapes and dtypes without holding data."""
