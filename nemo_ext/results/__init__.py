"""What a search found: the record of one prompt, and the folder that keeps the records of many."""
