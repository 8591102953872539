"""Attention without a causal mask, for the lengths of vision transformers."""
