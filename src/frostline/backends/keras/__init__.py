"""The Keras backend: names, layer groups, freezing, optimizer side, on each of Keras's backends."""
