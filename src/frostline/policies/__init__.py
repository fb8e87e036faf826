"""Shipped policies, one file per family; each is found by name through the registry."""
