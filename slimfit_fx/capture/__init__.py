"""From torch.compile's graph to a compiled function with gates."""
