"""Each family's configuration and tensors as transformers has them."""
