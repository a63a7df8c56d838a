"""What a run costs before it runs: FLOPs, memory, activations and step time, by formula."""
