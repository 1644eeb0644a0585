"""Exchanges from the literature, run over the simulated network beside the product's own pull. Not in the product."""
