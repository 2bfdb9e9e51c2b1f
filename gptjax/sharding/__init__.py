"""Models over several devices: the mesh, and which part of a model each device has."""
