"""Recipes of backbones, as data: a TOML file and a weightless graph each."""
