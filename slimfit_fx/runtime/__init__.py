"""What runs at every step: gates, ghosts and the hooks around the optimizer."""
