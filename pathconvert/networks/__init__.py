"""Networks in files: architectures, preprocessing, images, loading, and checked conversion of files."""
