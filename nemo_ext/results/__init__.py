"""The results of a search: the record of one prompt, and the folder that stores the records of many prompts."""
