"""Runs compared: under one budget, by seed, with intervals, and what follows from them."""
