"""The Hugging Face hub: the card of a model, made from its run, and pushing an export."""
