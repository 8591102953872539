"""A linear layer, the residual add and the layer norm that follow it, in one step."""
