"""Side-by-side benchmarks: each contender in its own process, checked before it is timed."""
