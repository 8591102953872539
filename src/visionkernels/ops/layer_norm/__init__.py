"""Layer normalisation, alone and with a residual add."""
