"""A world in a box: the simulated network on which the same node code runs in virtual time."""
