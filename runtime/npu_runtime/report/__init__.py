"""Records of exports, parity runs and benchmarks as a report for people: one HTML page that needs nothing, Markdown."""
