"""The main job on the icons: tiny configurations, their trained weights, the run."""
