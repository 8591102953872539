"""AOTInductor."""
