"""What a peer's own Python runs: nothing here imports anything of QuantLab."""
