"""How the bundled model was made: images, training, figures and card. README.md beside this file says how to run it."""
