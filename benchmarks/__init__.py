"""Speed and memory of the block, side by side with what a user would write."""
