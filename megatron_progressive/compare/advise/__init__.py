"""What is known of growing a model like the one at hand: evidence, how far it is, and an answer."""
