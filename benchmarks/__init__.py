"""Speed claims held against named peers, in the same run. Nothing in the product imports this."""
