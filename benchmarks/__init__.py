"""What Gossamer costs, as ratios against a baseline measured in the same run on the same machine."""
