"""The model: stock weights, isolated packed segments, the head on selected positions only.

`families` knows the architectures, `bert` has the configuration and builds, `pretrained` reads checkpoints, `head` is the module that is trained,
`attention` its mask. `bert` and `pretrained` import torch and transformers only when they build something, so that the
configuration of a run can be read without them.
"""
