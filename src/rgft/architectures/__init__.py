"""How known architectures are built, in plain strings and shapes: no component, no model library.

`patterns` holds the tables of module names inside a layer, `layers` finds the layers and what lies outside them,
`roles` says which rows and columns of which weight belong to which head or neuron block.
"""
