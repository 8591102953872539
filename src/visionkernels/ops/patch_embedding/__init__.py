"""The patch embedding of vision transformers."""
