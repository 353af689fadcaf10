"""Training and sampling in few bits: the gap between both sides, and the reward that is reached."""
