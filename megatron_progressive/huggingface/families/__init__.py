"""The configuration and the tensors of each family, as transformers has them."""
