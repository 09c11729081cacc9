"""Ways of choosing who computes a pair whose expert is missing: pure functions of one routing."""
