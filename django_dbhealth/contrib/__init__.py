"""One thin module for each foreign library, imported only by who uses it."""
