"""The embedded default backbone, as data: see README.md beside this file."""
