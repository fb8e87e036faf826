"""From the name of some data and the name of a model to something that can be trained."""
