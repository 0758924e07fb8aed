"""Scenes, training, export and evaluation of the demo model that ships with Opsin."""
