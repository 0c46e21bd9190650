"""Generation: a causal network run token by token, one cache, and the methods that decide how tokens are made."""
