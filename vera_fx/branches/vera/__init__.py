"""VeRA (arXiv 2310.11454): ``y = Wx + b * (B (d * (A x)))`` with A and B frozen and shared by all layers."""
