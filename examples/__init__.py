"""What is made with nemo_ext; it is run from the repository's root and is no part of the installed package."""
