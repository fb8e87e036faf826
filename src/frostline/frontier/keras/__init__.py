"""The frozen region of Keras models: cut off, run once per sample, stored, replayed."""
