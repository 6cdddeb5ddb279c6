"""Recipes: one page per published system, each with a claim that its run reproduces or refutes."""
