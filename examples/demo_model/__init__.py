"""Makes the bundled model: images, training, figures and card. README.md beside this file says how to run it."""
