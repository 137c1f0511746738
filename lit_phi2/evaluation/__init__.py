"""How good completions are, compared with baselines."""
