"""What a network is made of, what it sees, and what it has learnt.

`layers.layer_table` counts a network layer by layer, `drawing` draws it, `maps`, `excitation`, `saliency` and
`equivariance` look at what its filters answer to, on a user's own model and scan. All take any network of medseg and
return tensors or arrays, for `medseg inspect MODEL`, TensorBoard and notebooks alike.
"""
