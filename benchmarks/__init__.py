"""Performance as ratios against what a user would pick instead; gates in gates.yaml."""
