"""What a search found, for people to look at: an HTML page with plots, and sheets of images."""
