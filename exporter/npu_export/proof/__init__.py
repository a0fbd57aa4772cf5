"""What an artifact is proven with: what rounding does to this network with these weights, and limits that follow."""
