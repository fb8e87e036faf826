"""The frozen region: found in any graph, its outflow stored per sample, the rest replayed."""
