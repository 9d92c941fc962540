"""Turns embeds into what a diffusers pipeline takes."""
