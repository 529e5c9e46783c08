"""Transforms, one file each; found by the registry, imported by nobody."""
