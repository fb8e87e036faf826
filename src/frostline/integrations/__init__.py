"""Frostline beside other tools: translation only.

=================  ==================================================================
`trackers`         TensorBoard, MLflow, Weights & Biases and Trackio, each by its own API
`tracker_process`  the process in which they live
`tracking`         what a run or a driver tells them
=================  ==================================================================
"""
