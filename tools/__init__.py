"""What makes the project's own files: not part of the package."""
