"""Pictures with labels: drawn shapes, and folders of image files. Needs no torch."""
