"""Densities that fine-tuning learns: where they live, how they are checked, what is offered."""
