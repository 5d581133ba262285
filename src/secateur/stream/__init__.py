"""Floor 3: models pruned block by block, each block behind those that are done."""
