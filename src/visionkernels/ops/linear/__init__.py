"""Linear layers with bias, activation, LayerScale and residual add in one step."""
